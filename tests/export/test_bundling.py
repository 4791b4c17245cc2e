"""What a build keeps and replaces; exporting only writes a few bytes here."""

import dataclasses
from pathlib import Path

import pytest

from engines.store import SharedStore, Store
from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint
from export.networks import NETWORKS
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import CheckpointError, InputError
from tests.export.bundles import SMALL, build, checkpoint_of, contents, folders, verify


def test_a_whole_bundle(tmp_path, exports, written, tiny_geometry):
    bundle = build(tmp_path, NETWORKS)
    assert verify(tmp_path) == bundle
    assert exports == list(bundle.manifest.networks) == list(NETWORKS)
    assert bundle.manifest.geometry == tiny_geometry
    assert bundle.manifest.base == "tiny"
    assert {source.name for source in bundle.manifest.sources} == {"random weights, seed 0"}
    assert {"tokenizers/text.json", "tokenizers/language.json"} <= set(bundle.manifest.files)
    for name, entry in bundle.manifest.networks.items():
        assert entry.spec == NETWORKS[name].spec(tiny_geometry)
        assert sorted(Path(f).name for f in entry.graphs) == ["lowered.onnx", "model.onnx"]
        groups = [Path(f).parent.name.rsplit("-", 1)[0] for f in entry.weights]
        assert groups == (["unet", name] if "unet" in NETWORK_ROLES[name] else [name])
    denoiser, subject_encoder = (bundle.network(name) for name in ("denoiser", "subject_encoder"))
    assert denoiser.weights[0] == subject_encoder.weights[0], "they share the UNet"
    assert sorted(written) == sorted({*NETWORKS, "unet"}), "each once"


@pytest.mark.parametrize(
    ("role", "folder", "reason"),
    [
        ("text_encoder", "SG161222/Realistic_Vision_V4.0_noVAE/tokenizer", "616 embeddings, but .* 615 tokens"),
        ("language", "KunpengSong/MoMA_llava_7b", "ids up to 554, but the language model has 500 embeddings"),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_its_network(tmp_path, exports, tiny_checkpoint, hub, role, folder, reason):
    component, size = getattr(tiny_checkpoint, role), {"text_encoder": 616, "language": 500}[role]
    component = dataclasses.replace(component, config={**component.config, "vocab_size": size})
    tokenizer = {"text_encoder": "text_tokenizer", "language": "language_tokenizer"}[role]
    checkpoint = dataclasses.replace(tiny_checkpoint, **{role: component, tokenizer: hub / folder})
    with pytest.raises(CheckpointError, match=reason):
        build(tmp_path, ["text_encoder", "language_model"], checkpoint)
    assert exports == []


def made_at(root: Path) -> dict[Path, tuple[int, int]]:
    """Return the inode and the modification time of everything in the folders of networks and weights."""
    paths = (path for kind in ("networks", "weights") for path in (root / kind).rglob("*"))
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_second_build_does_nothing(tmp_path, exports, written):
    build(tmp_path, NETWORKS)
    times, before, reports = made_at(tmp_path), contents(tmp_path), []
    exports.clear()
    written.clear()
    build(tmp_path, NETWORKS, report=lambda *args: reports.append(args))
    assert exports == written == []
    assert contents(tmp_path) == before
    assert made_at(tmp_path) == times
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
def test_another_source_rebuilds_what_is_made_of_it(tmp_path, exports, written, tiny_checkpoint, role):
    build(tmp_path, NETWORKS)
    before, weights_before = folders(tmp_path), folders(tmp_path, "weights")
    exports.clear()
    written.clear()
    other = getattr(load_checkpoint(CheckpointRequest("tiny", seed=1)), role)
    checkpoint = dataclasses.replace(tiny_checkpoint, **{role: other})
    affected = [name for name in NETWORKS if role in NETWORK_ROLES[name]]
    build(tmp_path, NETWORKS, checkpoint)
    manifest = verify(tmp_path).manifest
    assert exports == affected
    changed = [name for name, place in folders(tmp_path).items() if place != before[name]]
    assert sorted(changed) == sorted(affected)
    # Denoiser and subject encoder share a file with the UNet's weights.
    groups = ["unet"] if role == "unet" else affected
    changed = [name for name, place in folders(tmp_path, "weights").items() if place != weights_before[name]]
    assert sorted(changed) == sorted(written) == sorted(groups)
    assert {source.role: source.sha256 for source in manifest.sources}[role] == other.sha256


def test_only_with_another_source_drops_what_no_longer_fits(tmp_path, exports):
    build(tmp_path, NETWORKS)
    before = folders(tmp_path)
    unet = checkpoint_of(["denoiser"]).unet
    build(tmp_path, ["denoiser"], dataclasses.replace(checkpoint_of(["denoiser"], seed=1), unet=unet))
    manifest = verify(tmp_path).manifest
    # The adapters have changed: networks made of the old ones must not run beside the new denoiser.
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
    assert exports == [*NETWORKS], "its own content is the same, so it is reused"


def test_a_build_without_graphs_writes_weights_alone(tmp_path, exports, written):
    build(tmp_path, graphs=False)
    manifest = verify(tmp_path).manifest
    assert exports == []
    assert written == list(SMALL)
    assert not list((tmp_path / "networks").iterdir())
    assert {(entry.onnx, entry.lowered) for entry in manifest.networks.values()} == {(None, None)}
    written.clear()
    build(tmp_path)
    assert exports == list(SMALL), "graphs are added later"
    assert written == []
    assert all(len(entry.graphs) == 2 for entry in verify(tmp_path).manifest.networks.values())


def test_a_build_without_graphs_keeps_existing_graphs(tmp_path, exports, written):
    build(tmp_path / "a")
    before = contents(tmp_path / "a")
    build(tmp_path / "a", graphs=False)
    assert contents(tmp_path / "a") == before
    build(tmp_path / "a", checkpoint=checkpoint_of(SMALL, seed=1), graphs=False)
    assert not any(entry.graphs for entry in verify(tmp_path / "a").manifest.networks.values()), "of other weights"
    alone, shared = tmp_path / "alone", SharedStore(tmp_path / "store")
    build(tmp_path / "b", shared=shared)
    build(alone, shared=shared, graphs=False)
    assert not list((alone / "networks").iterdir()), "graphs of another bundle are not linked"


def test_two_builds_at_once(tmp_path, exports):
    def second(network, stage):
        with pytest.raises(InputError, match="another build is writing it; wait for it or choose another folder"):
            build(tmp_path)

    build(tmp_path, report=second)
    verify(tmp_path)
    with Store(tmp_path).locked():
        second("", "")
