import copy
import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moma_rt.bundle.engines import EngineEntry, Flavour, KernelsEntry
from moma_rt.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Bundle,
    FileEntry,
    Manifest,
    NetworkEntry,
    Source,
    write_manifest,
)
from moma_rt.bundle.specs import Dim, Geometry, LanguageGeometry, NetworkSpec, Precision, SelfAttentionLayer, TensorSpec
from moma_rt.errors import BundleError
from moma_rt.files import sha256_file

ONNX = "networks/text_encoder-k1/model.onnx"
LOWERED = "networks/text_encoder-k1/lowered.onnx"
ENGINE = "engines/text_encoder-e1/engine.trt"
KERNELS = "kernels/text_encoder_sm80-k2/kernels.json"
WEIGHTS = "weights/text_encoder-w1/weights.safetensors"
BATCH = Dim("batch", 1, 1, 8)


def make_manifest(files: dict[str, FileEntry]) -> Manifest:
    spec = NetworkSpec(
        "text_encoder",
        (TensorSpec("token_ids", "int32", (BATCH, 77)),),
        (TensorSpec("text_tokens", "float32", (BATCH, 77, 768)),),
    )
    layers = (SelfAttentionLayer("down_blocks.0.attentions.0", 64, 16, 8), SelfAttentionLayer("mid_block", 8, 32, 8))
    return Manifest(
        base="tiny",
        created_by="moma-rt test",
        geometry=Geometry(512, 4, 64, 77, 768, 4, 1024, layers, LanguageGeometry(32000, 128, 3, 4, 32, 336, 576)),
        networks={"text_encoder": NetworkEntry(spec, Precision.FP32, "k1", "s1", ONNX, LOWERED, (WEIGHTS,))},
        files=files,
        sources=(Source("base", "tiny", "0" * 64),),
        engines=(
            EngineEntry(
                "text_encoder", Flavour.TENSORRT_RTX, "1.7.1", (86, 89), False, "k1", "e1", ENGINE, 7, None, "h"
            ),
        ),
        kernels=(KernelsEntry("text_encoder", 80, "k2", KERNELS),),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A complete bundle with one network of two files."""
    folder = tmp_path / "bundle"
    contents = {ONNX: b"graph", LOWERED: b"old", ENGINE: b"engine", KERNELS: b"{}", WEIGHTS: b"weights" * 100}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {n: FileEntry(sha256_file(folder / n), (folder / n).stat().st_size) for n in contents}
    write_manifest(folder, make_manifest(files))
    return folder


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def open_error(root: Path) -> str:
    with pytest.raises(BundleError) as error:
        Bundle.open(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def rename_file(data: dict[str, Any], name: str) -> None:
    data["networks"]["text_encoder"]["weights"] = [name]
    data["files"][name] = data["files"].pop(WEIGHTS)


class TestOpen:
    def test_round_trip(self, root: Path):
        manifest = Bundle.open(root).manifest
        assert manifest == make_manifest(manifest.files)
        assert Manifest.from_json(copy.deepcopy(manifest.to_json())) == manifest
        assert manifest.geometry.grids == (64, 8)

    def test_geometry_without_language_model(self, root: Path):
        edit(root, lambda data: data["geometry"].update(language=None))
        assert Bundle.open(str(root)).manifest.geometry.language is None

    @pytest.mark.parametrize("exists", [True, False])
    def test_not_a_bundle(self, tmp_path: Path, exists: bool):
        folder = tmp_path / "empty"
        if exists:
            folder.mkdir()
        assert "is not a bundle" in open_error(folder)

    def test_newer_format(self, root: Path):
        edit(root, lambda data: data.update(format_version=FORMAT_VERSION + 1, networks="unknown to this version"))
        message = open_error(root)
        assert f"bundle format {FORMAT_VERSION + 1}" in message
        assert "upgrade" in message

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"{", b"[]", b"null", b"{}", b'{"format_version": "x"}', b"\xff\xfe\x00"),
            pytest.param(b"[" * 200_000, id="nested without end"),
            *(b'{"format_version": 1e999}', b'{"format_version": NaN}', b'{"format_version": null}'),
        ],
    )
    def test_unreadable_manifest(self, root: Path, content: bytes):
        (root / MANIFEST_NAME).write_bytes(content)
        assert "cannot be read as a manifest" in open_error(root)

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.pop("geometry"),
            lambda d: d.pop("files"),
            lambda d: d.update(networks=[]),
            lambda d: d.update(files=None),
            lambda d: d["geometry"].pop("grids", None) or d["geometry"].update(extra=1),
            lambda d: d["geometry"].pop("language"),
            lambda d: d["geometry"]["self_attention"][0].pop("heads"),
            lambda d: d["networks"]["text_encoder"].update(precision="fp7"),
            lambda d: d["networks"]["text_encoder"].pop("spec"),
            lambda d: d["networks"]["text_encoder"]["spec"]["inputs"][0]["shape"][0].pop("max"),
            lambda d: d["files"][ONNX].update(size="many"),
            lambda d: d["files"][ONNX].update(size=float("inf")),
            lambda d: d["files"].update({ONNX: "hash"}),
            lambda d: d["sources"].append({}),
            lambda d: d.pop("engines"),
            lambda d: d["engines"].append({}),
            lambda d: d["engines"][0].update(flavour="tensorrt_lite"),
            lambda d: d["engines"][0].update(capabilities=[]),
            lambda d: d["engines"][0].update(capabilities=["sm86"]),
            lambda d: d["engines"][0].update(capabilities=[True]),
            lambda d: d["engines"][0].update(weight_bytes=-1),
            lambda d: d["engines"][0].update(activation_bytes=1.5),
            lambda d: d["engines"][0].update(refittable="no"),
            lambda d: d["engines"][0].update(version=""),
            lambda d: d["engines"][0].update(file=None),
            lambda d: d["engines"][0].pop("kernels"),
            lambda d: d["engines"][0].update(kernels=False),
            lambda d: d["engines"][0].update(kernels=""),
            lambda d: d.pop("kernels"),
            lambda d: d["kernels"].append({}),
            lambda d: d["kernels"][0].update(capability="80"),
            lambda d: d["kernels"][0].update(capability=1000),
            lambda d: d["kernels"][0].update(network=None),
            lambda d: d["kernels"][0].update(file="a\nb"),
            lambda d: d["kernels"][0].update(extra=1),
            lambda d: d["networks"]["text_encoder"].pop("lowered"),
            lambda d: d["networks"]["text_encoder"].pop("structure"),
            lambda d: d["networks"]["text_encoder"].update(weights=None),
            lambda d: d["networks"]["text_encoder"].update(weights=WEIGHTS),
            lambda d: d.update(left_out="ONNX graphs"),
            lambda d: d.update(packed_for="sm86\nsm89"),
            lambda d: d["engines"][0].update(measured=None),
        ],
    )
    def test_malformed_manifest(self, root: Path, change: Callable[[dict[str, Any]], None]):
        edit(root, change)
        assert "is malformed" in open_error(root)

    def test_missing_file(self, root: Path):
        (root / WEIGHTS).unlink()
        assert f"{WEIGHTS} is missing; build the bundle again" in open_error(root)

    def test_folder_in_place_of_a_file(self, root: Path):
        (root / WEIGHTS).unlink()
        (root / WEIGHTS).mkdir()
        assert f"{WEIGHTS} is not a file" in open_error(root)

    def test_truncated_file(self, root: Path):
        (root / WEIGHTS).write_bytes(b"weights")
        message = open_error(root)
        assert f"{WEIGHTS} has 7 bytes" in message
        assert "700" in message

    @pytest.mark.parametrize("name", [ONNX, LOWERED, ENGINE, KERNELS, WEIGHTS])
    def test_used_file_without_a_hash(self, root: Path, name: str):
        edit(root, lambda data: data["files"].pop(name))
        assert f"uses {name!r} but gives no hash" in open_error(root)

    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "networks/../../outside", "a\\..\\b", "C:x", ""])
    def test_unsafe_path(self, root: Path, name: str):
        edit(root, lambda data: rename_file(data, name))
        assert "unsafe manifest" in open_error(root)

    def test_unsafe_path_of_kernels(self, root: Path):
        def leave(data: dict[str, Any]) -> None:
            data["kernels"][0]["file"] = "../../etc/passwd"
            data["files"]["../../etc/passwd"] = data["files"].pop(KERNELS)

        edit(root, leave)
        assert "unsafe manifest" in open_error(root)


class TestVerify:
    def test_untouched_files_pass(self, root: Path):
        Bundle.open(root).verify([ONNX, WEIGHTS])

    def test_altered_file_of_the_same_size(self, root: Path):
        (root / WEIGHTS).write_bytes(b"weightz" * 100)
        bundle = Bundle.open(root)
        bundle.verify([ONNX])
        with pytest.raises(BundleError, match=f"{WEIGHTS} was altered") as error:
            bundle.verify([ONNX, WEIGHTS])
        assert sha256_file(root / WEIGHTS)[:12] in str(error.value)
        assert bundle.manifest.files[WEIGHTS].sha256[:12] in str(error.value)

    def test_file_that_went_or_cannot_be_read(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        bundle = Bundle.open(root)
        (root / WEIGHTS).unlink()
        with pytest.raises(BundleError, match=f"{WEIGHTS} is missing; build the bundle again"):
            bundle.verify([WEIGHTS])

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("moma_rt.bundle.contents.sha256_file", refuse)
        with pytest.raises(BundleError, match=f"{ONNX} cannot be read: Permission denied"):
            bundle.verify([ONNX])

    def test_file_that_the_manifest_does_not_list(self, root: Path):
        (root / "extra.onnx").write_bytes(b"x")
        with pytest.raises(BundleError, match=r"does not list extra\.onnx"):
            Bundle.open(root).verify(["extra.onnx"])


class TestNetworks:
    def test_absent_network_names_what_there_is(self, root: Path):
        bundle = Bundle.open(root)
        assert bundle.network("text_encoder").onnx == ONNX
        with pytest.raises(BundleError, match=r"no denoiser network \(it has: text_encoder\).*--only denoiser"):
            bundle.network("denoiser")

    def test_has(self, root: Path):
        bundle = Bundle.open(root)
        assert bundle.has("text_encoder")
        assert bundle.has()
        assert not bundle.has("text_encoder", "denoiser")

    def test_fingerprint_follows_the_weights_alone(self, root: Path):
        before = Bundle.open(root).fingerprint("base")
        edit(root, lambda data: data.update(created_by="another version"))
        edit(root, lambda data: data["networks"]["text_encoder"].update(key="k2"))
        assert Bundle.open(root).fingerprint("base") == before
        edit(root, lambda data: data["sources"][0].update(sha256="1" * 64))
        assert Bundle.open(root).fingerprint("base") != before

    def test_fingerprint_of_weights_it_does_not_hold(self, root: Path):
        bundle = Bundle.open(root)
        assert bundle.has_sources("base")
        assert not bundle.has_sources("base", "unet")
        with pytest.raises(BundleError, match=r"nothing made of the unet weights \(it has: base\)"):
            bundle.fingerprint("unet")


@pytest.mark.parametrize("beside", [ONNX, WEIGHTS])
def test_a_file_without_a_hash_beside_those_of_a_network(root: Path, beside: str):
    path = (root / beside).with_name("more.safetensors")
    path.write_bytes(b"what a graph might read")
    with pytest.raises(BundleError, match=rf"{path.parent.name}/more\.safetensors is in no network of the manifest"):
        Bundle.open(root)


def without_graphs(data: dict[str, Any]) -> None:
    data["networks"]["text_encoder"].update(onnx=None, lowered=None)
    for name in (ONNX, LOWERED):
        data["files"].pop(name)


def test_a_network_without_graphs(root: Path):
    edit(root, without_graphs)
    shutil.rmtree((root / ONNX).parent)
    bundle = Bundle.open(root)
    assert bundle.network("text_encoder").all_files == (WEIGHTS,)
    assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest
    with pytest.raises(BundleError, match="has no ONNX graph of text_encoder, since it was built for inductor alone"):
        bundle.graph("text_encoder")


def test_which_engines_were_built_from_a_network(root: Path):
    manifest = Bundle.open(root).manifest
    network, (engine,) = manifest.networks["text_encoder"], manifest.engines
    assert network.made(engine)
    assert not network.made(dataclasses.replace(engine, source="s1"))
    package = dataclasses.replace(engine, flavour=Flavour.INDUCTOR)
    assert not network.made(package)
    assert network.made(dataclasses.replace(package, source="s1")), "a package does not depend on the weights"


def test_the_builds_own_record_may_lie_beside_a_network(root: Path):
    (root / ONNX).with_name("record.json").write_text("{}")
    assert Bundle.open(root).has("text_encoder")


def test_format_below_the_first(root: Path):
    edit(root, lambda data: data.update(format_version=-3))
    with pytest.raises(BundleError, match="format_version is -3, there is none below 1"):
        Bundle.open(root)


def test_manifest_is_replaced_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    before = (root / MANIFEST_NAME).read_bytes()
    monkeypatch.setattr(Manifest, "to_json", lambda _: {"not": object()})
    with pytest.raises(TypeError):
        write_manifest(root, make_manifest({}))
    assert (root / MANIFEST_NAME).read_bytes() == before
    assert {path.name for path in root.iterdir()} == {MANIFEST_NAME, "networks", "weights", "engines", "kernels"}


class TestSpecs:
    def test_shapes_of_the_profile(self):
        spec = TensorSpec("x", "float32", (Dim("batch", 1, 2, 8), 77, Dim("tokens", 0, 4, 9)))
        assert spec.min_shape == (1, 77, 0)
        assert spec.opt_shape == (2, 77, 4)
        assert spec.max_shape == (8, 77, 9)
        assert spec.resolve(batch=3, tokens=5) == (3, 77, 5)
        assert [(axis, dim.name) for axis, dim in spec.dynamic_axes.items()] == [(0, "batch"), (2, "tokens")]
        assert TensorSpec.from_json(spec.to_json()) == spec

    def test_unresolved_dimension(self):
        with pytest.raises(KeyError, match="batch"):
            TensorSpec("x", "float32", (BATCH,)).resolve(tokens=1)
