"""What a build keeps, replaces, repairs and leaves behind; exporting is a few bytes here except where said."""

import collections
import dataclasses
import json
from pathlib import Path

import pytest

from engines.store import Store
from export import bundling
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint, roles_for
from export.networks import NETWORKS, Precisions
from moma_rt.bundle import Bundle
from moma_rt.errors import CheckpointError, InputError
from moma_rt.specs import Precision

SMALL = ("text_encoder", "context_projector")
FP32 = Precisions()
STAGES = [(name, stage) for name in SMALL for stage in ("checking", "tracing", "hashing", "built")]


@pytest.fixture
def exports(monkeypatch):
    """Replaces tracing by writing the hashes of a network's sources; the list of what was exported."""
    done = []

    def sources(name, checkpoint):
        return {c.role: c.sha256 for c in checkpoint.components if c.role in NETWORK_ROLES[name]}

    def export(checkpoint, network, geometry, precision, folder):
        (folder / "model.onnx").write_text(f"{network.name} {sources(network.name, checkpoint)}")
        (folder / "lowered.onnx").write_text(f"{network.name} lowered")
        (folder / "model.onnx.data").write_bytes(b"weights of " + network.name.encode())
        done.append(network.name)

    monkeypatch.setattr(bundling, "export_network", export)
    # There is nothing large to free, and a collection looks at everything that pytest holds.
    monkeypatch.setattr("gc.collect", lambda: 0)
    return done


def checkpoint_of(names, **changes):
    roles = roles_for(names)
    # As the command line does: the language model's sizes need the vision encoder's config.
    return load_checkpoint(
        CheckpointRequest("tiny", roles=roles | {"vision"} if "language" in roles else roles, **changes)
    )


def build(out, names=SMALL, checkpoint=None, report=lambda *_: None, precisions=FP32):
    return build_bundle(checkpoint or checkpoint_of(names), ExportPlan(tuple(names), precisions), out, report)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def folders(root: Path) -> dict[str, tuple[str, int]]:
    """Network → the name and the inode of its folder."""
    places = (root / "networks").iterdir()
    return {p.name.rsplit("-", 1)[0]: (p.name, p.stat().st_ino) for p in places}


def verify(root: Path) -> Bundle:
    """A bundle whose every file has its hash, and in whose folder nothing else lies."""
    bundle = Bundle.open(root)
    bundle.verified(bundle.manifest.files)
    records = {f"{entry.folder}/record.json" for entry in bundle.manifest.networks.values()}
    assert set(contents(root)) == set(bundle.manifest.files) | records | {"manifest.json", ".lock"}
    assert set(folders(root)) == set(bundle.manifest.networks)
    used = set().union(*(NETWORK_ROLES[name] for name in bundle.manifest.networks))
    assert {source.role for source in bundle.manifest.sources} == used
    return bundle


def test_a_whole_bundle(tmp_path, exports, tiny_geometry):
    bundle = build(tmp_path, NETWORKS)
    assert verify(tmp_path) == bundle
    assert exports == list(bundle.manifest.networks) == list(NETWORKS)
    assert bundle.manifest.geometry == tiny_geometry
    assert bundle.manifest.base == "tiny"
    assert {source.name for source in bundle.manifest.sources} == {"random weights, seed 0"}
    assert {"tokenizers/text.json", "tokenizers/language.json"} <= set(bundle.manifest.files)
    for name, entry in bundle.manifest.networks.items():
        assert entry.spec == NETWORKS[name].spec(tiny_geometry)
        assert sorted(Path(f).name for f in entry.files) == ["lowered.onnx", "model.onnx", "model.onnx.data"]


def test_a_second_build_does_nothing(tmp_path, exports):
    build(tmp_path, NETWORKS)
    times = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "networks").rglob("*")}
    before, reports = contents(tmp_path), []
    exports.clear()
    build(tmp_path, NETWORKS, report=lambda *args: reports.append(args))
    assert exports == []
    assert contents(tmp_path) == before
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "networks").rglob("*")} == times
    assert reports == [(name, state) for name in NETWORKS for state in ("checking", "kept")]


def test_two_builds_make_the_same_bytes(tmp_path, exports):
    assert contents(build(tmp_path / "a", NETWORKS).root) == contents(build(tmp_path / "b", NETWORKS).root)


def test_only_adds_and_keeps_the_others(tmp_path, exports, tiny_geometry):
    build(tmp_path, ["text_encoder"])
    assert Bundle.open(tmp_path).manifest.geometry == dataclasses.replace(tiny_geometry, language=None)
    first = folders(tmp_path)
    for added in (["language_model"], ["vae_decoder"], ["denoiser", "context_projector"]):
        before = folders(tmp_path)
        build(tmp_path, added)
        manifest = verify(tmp_path).manifest
        assert manifest.geometry == tiny_geometry
        assert folders(tmp_path).items() >= before.items()
        assert set(manifest.networks) == {*before, *added}
        assert list(manifest.networks) == [name for name in NETWORKS if name in manifest.networks]
    assert exports == ["text_encoder", "language_model", "vae_decoder", "denoiser", "context_projector"]
    assert folders(tmp_path)["text_encoder"] == first["text_encoder"]


@pytest.mark.parametrize("role", ["unet", "vae", "text_encoder", "adapters", "language", "vision"])
def test_another_source_rebuilds_what_is_made_of_it(tmp_path, exports, tiny_checkpoint, role):
    build(tmp_path, NETWORKS)
    before = folders(tmp_path)
    exports.clear()
    other = getattr(load_checkpoint(CheckpointRequest("tiny", seed=1)), role)
    checkpoint = dataclasses.replace(tiny_checkpoint, **{role: other})
    affected = [name for name in NETWORKS if role in NETWORK_ROLES[name]]
    build(tmp_path, NETWORKS, checkpoint)
    manifest = verify(tmp_path).manifest
    assert exports == affected
    changed = [name for name, place in folders(tmp_path).items() if place != before[name]]
    assert sorted(changed) == sorted(affected)
    assert {source.role: source.sha256 for source in manifest.sources}[role] == other.sha256


def test_only_with_another_source_drops_what_no_longer_fits(tmp_path, exports):
    build(tmp_path, NETWORKS)
    before = folders(tmp_path)
    unet = checkpoint_of(["denoiser"]).unet
    build(tmp_path, ["denoiser"], dataclasses.replace(checkpoint_of(["denoiser"], seed=1), unet=unet))
    manifest = verify(tmp_path).manifest
    # The adapters are others now: what was made of the old ones may not run beside the new denoiser.
    assert set(NETWORKS) - set(manifest.networks) == {"subject_encoder", "language_model", "context_projector"}
    kept = set(manifest.networks) - {"denoiser"}
    assert {name: folders(tmp_path)[name] for name in kept} == {name: before[name] for name in kept}
    names = {source.role: source.name for source in manifest.sources}
    assert names["adapters"] == "random weights, seed 1"
    assert names["vae"] == "random weights, seed 0"


@pytest.mark.parametrize("change", ["base", "sizes"])
def test_networks_of_another_base_do_not_mix(tmp_path, exports, change):
    build(tmp_path, NETWORKS)
    checkpoint = checkpoint_of(["vae_decoder"])
    if change == "base":
        checkpoint = dataclasses.replace(checkpoint, base="other")
    else:
        # A folder of the same name whose UNet is wider: its denoiser would not fit the others.
        unet = dataclasses.replace(checkpoint.unet, config={**checkpoint.unet.config, "cross_attention_dim": 128})
        checkpoint = dataclasses.replace(checkpoint, unet=unet)
    build(tmp_path, ["vae_decoder"], checkpoint)
    manifest = verify(tmp_path).manifest
    assert list(manifest.networks) == ["vae_decoder"]
    assert not list((tmp_path / "tokenizers").iterdir())
    assert exports == [*NETWORKS], "its own content is the same: it is found again"


def test_the_code_and_the_libraries_are_part_of_the_key(monkeypatch, tiny_checkpoint, tiny_geometry):
    network = NETWORKS["vae_decoder"]
    spec = network.spec(tiny_geometry)

    def key():
        return bundling.network_key(tiny_checkpoint.components, spec, Precision.FP32)

    first = key()
    assert key() == first
    renamed = tuple(dataclasses.replace(c, name="renamed") for c in tiny_checkpoint.components)
    assert bundling.network_key(renamed, spec, Precision.FP32) == first
    assert bundling.network_key(renamed, spec, Precision.BF16) != first, "the same tensors, another arithmetic"
    with monkeypatch.context() as patch:
        patch.setattr(bundling, "_code_hash", lambda: "other code")
        assert key() != first
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda _: "0")
        assert key() != first


def overwrite(path, content):
    """In place, as a hand or a disk does: files are not writable, and other bundles may link them."""
    path.chmod(0o644)
    path.write_bytes(content)


def truncate(folder):
    overwrite(folder / "model.onnx.data", b"weights")


def alter(folder):
    path = folder / "model.onnx"
    overwrite(path, path.read_bytes()[::-1])


def lose(folder):
    (folder / "model.onnx").unlink()


def unreadable_record(folder):
    (folder / "record.json").write_text("{")


DAMAGES = [truncate, alter, lose, unreadable_record]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("names", [SMALL, ("text_encoder",)], ids=["all", "only"])
def test_a_damaged_network_is_repaired(tmp_path, exports, damage, names):
    build(tmp_path)
    before = contents(tmp_path)
    damage(tmp_path / "networks" / folders(tmp_path)["text_encoder"][0])
    exports.clear()
    build(tmp_path, names)
    verify(tmp_path)
    assert exports == ["text_encoder"]
    assert contents(tmp_path) == before


def test_only_drops_another_network_that_is_damaged(tmp_path, exports):
    build(tmp_path)
    truncate(tmp_path / "networks" / folders(tmp_path)["context_projector"][0])
    build(tmp_path, ["text_encoder"])
    assert list(verify(tmp_path).manifest.networks) == ["text_encoder"]


@pytest.mark.parametrize("content", ["", "{", "null", '{"format_version": 99}', "[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_replaced(tmp_path, exports, content):
    build(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    exports.clear()
    build(tmp_path)
    assert exports == []
    assert contents(tmp_path) == before


def test_a_manifest_that_leaves_its_folder_is_not_followed(tmp_path, exports):
    out = tmp_path / "bundle"
    build(out)
    (tmp_path / "precious").write_text("keep")
    data = json.loads((out / "manifest.json").read_text())
    data["files"]["../precious"] = {"sha256": "0" * 64, "size": 4}
    (out / "manifest.json").write_text(json.dumps(data))
    build(out)
    verify(out)
    assert (tmp_path / "precious").read_text() == "keep"


def test_what_a_killed_build_left_is_removed(tmp_path, exports):
    build(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "networks" / ".partial-x").mkdir()
    (tmp_path / "networks" / ".partial-x" / "model.onnx").write_text("half")
    (tmp_path / ".partial-y.json").write_text("half a manifest")
    (tmp_path / "tokenizers" / ".partial-z.json").write_text("half a tokenizer")
    build(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("over", ["nothing", "an earlier bundle"])
@pytest.mark.parametrize("at", STAGES, ids="-".join)
def test_interrupted_at_each_stage(tmp_path, exports, over, at):
    old = None
    if over == "an earlier bundle":
        build(tmp_path, checkpoint=checkpoint_of(SMALL, seed=1))
        old = Bundle.open(tmp_path).manifest
    exports.clear()

    def interrupt(network, stage):
        if (network, stage.split(" in ")[0]) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, report=interrupt)
    assert not list(tmp_path.rglob(".partial-*"))
    if old is None:
        assert not (tmp_path / "manifest.json").exists()
    else:
        bundle = Bundle.open(tmp_path)
        bundle.verified(bundle.manifest.files)
        assert bundle.manifest == old
    finished, done = list(exports), collections.Counter()
    build(tmp_path, report=lambda network, stage: done.update({network: stage == "kept"}))
    verify(tmp_path)
    # "hashing" comes before a network has its name: that work is done again.
    kept = [name for name in finished if (name, "hashing") != at]
    assert [name for name in SMALL if done[name]] == kept


def test_two_builds_at_once(tmp_path, exports):
    def second(network, stage):
        with pytest.raises(InputError, match="another build is writing it; wait for it or choose another folder"):
            build(tmp_path)

    build(tmp_path, report=second)
    verify(tmp_path)
    with Store(tmp_path).locked():
        second("", "")


def test_a_full_disk(tmp_path, monkeypatch, exports):
    build(tmp_path, ["text_encoder"])
    before = contents(tmp_path)

    def fail(checkpoint, network, geometry, precision, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundling, "export_network", fail)
    with pytest.raises(InputError, match="No space left on device") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_an_unusable_tokenizer_shows_before_any_work(tmp_path, monkeypatch, exports):
    def refuse():
        raise CheckpointError("no tokenizer")

    monkeypatch.setattr("export.tokenizers.synthetic_text_tokenizer", refuse)
    with pytest.raises(CheckpointError):
        build(tmp_path / "bundle")
    assert exports == []
    assert not (tmp_path / "bundle").exists()
