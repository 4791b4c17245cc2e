"""Weights files: which tensors each holds, what its key depends on, and that it equals the module's state."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.store import Artifact, SharedStore
from export import network_weights
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.lora import parse_lora
from export.network_weights import WeightGroup, weight_groups
from export.networks import NETWORKS, Precisions
from export.quantize import packed_int4, quantize
from export.streaming import Projection
from moma_rt.bundle.specs import Precision
from moma_rt.errors import CheckpointError

WITH_UNET = ("subject_encoder", "denoiser")
OTHERS = tuple(name for name in NETWORKS if name not in WITH_UNET)


@pytest.fixture(scope="module")
def groups(tiny_checkpoint, tiny_geometry):
    """Returns a cached function: a network's groups by name, of the synthetic checkpoint or one of its geometry."""
    made = {}

    def of(network: str, checkpoint=tiny_checkpoint, precision=Precision.FP32) -> dict[str, WeightGroup]:
        # A checkpoint is not hashable; it is kept so that no other one gets the same id.
        key = (network, id(checkpoint), precision)
        if key not in made:
            found = weight_groups(NETWORKS[network], checkpoint, tiny_geometry, precision)
            made[key] = checkpoint, {group.name: group for group in found}
        return made[key][1]

    return of


@pytest.fixture(scope="module")
def same_checkpoint():
    """The synthetic checkpoint, loaded again."""
    return load_checkpoint(CheckpointRequest("tiny"))


@pytest.fixture(scope="module")
def other_checkpoint():
    """The synthetic checkpoint of another seed."""
    return load_checkpoint(CheckpointRequest("tiny", seed=1))


def keys(found: dict[str, WeightGroup]) -> dict[str, str]:
    return {name: group.key for name, group in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_of_a_network(groups, name):
    found = groups(name)
    assert list(found) == (["unet", name] if name in WITH_UNET else [name])
    names = [tensor.name for group in found.values() for tensor in group.tensors]
    assert len(set(names)) == len(names)
    for group in found.values():
        assert group.artifact == Artifact("weights", group.name, group.key)
        assert group.location == f"{group.name}-{group.key[:16]}/weights.safetensors"


def test_denoiser_and_subject_encoder_share_the_unet(groups):
    subject_encoder, denoiser = map(groups, WITH_UNET)
    assert subject_encoder["unet"].key == denoiser["unet"].key
    described = [{t.name: t.described for t in found["unet"].tensors} for found in (subject_encoder, denoiser)]
    assert described[0] == described[1]
    assert all(name.startswith("unet.") and ".processor." not in name for name in described[0])
    # Each has its own part of the adapters.
    own = [{t.name for t in groups(name)[name].tensors} for name in WITH_UNET]
    assert own[0] != own[1]
    assert all(".processor." in name or not name.startswith("unet.") for names in own for name in names)


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_are_equal_where_sources_are(groups, same_checkpoint, other_checkpoint, name):
    assert keys(groups(name, same_checkpoint)) == keys(groups(name))
    assert not set(keys(groups(name, other_checkpoint)).values()) & set(keys(groups(name)).values())


@pytest.mark.parametrize("role", ["unet", "vae", "text_encoder", "adapters", "language", "vision"])
def test_a_file_depends_on_its_own_sources(groups, tiny_checkpoint, other_checkpoint, role):
    """So two bases share MoMA's adapters, and everything else that they have in common."""
    checkpoint = dataclasses.replace(tiny_checkpoint, **{role: getattr(other_checkpoint, role)})
    changed = {
        group
        for name in NETWORKS
        for group, key in keys(groups(name, checkpoint)).items()
        if key != groups(name)[group].key
    }
    assert (
        changed
        == {
            "unet": {"unet"},
            "vae": {"vae_encoder", "vae_decoder"},
            "text_encoder": {"text_encoder"},
            "adapters": {"subject_encoder", "denoiser", "language_model", "context_projector"},
            "language": {"language_model", "vision_encoder"},
            "vision": {"vision_encoder"},
        }[role]
    )


def test_a_lora_changes_the_unet_alone(groups, tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.ones(1, 32), f"{layer}.lora_up.weight": torch.ones(32, 1)}
    save_file(lora, tmp_path / "style.safetensors")
    loras = (parse_lora(str(tmp_path / "style.safetensors")),)
    checkpoint = load_checkpoint(CheckpointRequest("tiny", loras=loras))
    changed = {
        g for name in NETWORKS for g, key in keys(groups(name, checkpoint)).items() if key != groups(name)[g].key
    }
    assert changed == {"unet"}
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    for found in (groups("denoiser"), groups("denoiser", checkpoint)):
        found["unet"].write(tmp_path)
        tensors = load_file(tmp_path / "weights.safetensors")
        (tmp_path / "weights.safetensors").rename(tmp_path / found["unet"].key)
        assert tensors[name].shape == (32, 32)
    before, after = (load_file(tmp_path / f["unet"].key) for f in (groups("denoiser"), groups("denoiser", checkpoint)))
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    torch.testing.assert_close(after[name] - before[name], torch.ones(32, 32))


def test_precision_and_format_are_part_of_a_key(groups, monkeypatch, tiny_checkpoint, tiny_geometry):
    fp32, fp16, bf16 = (
        keys(groups("vae_decoder", precision=Precision(p)))["vae_decoder"] for p in ("fp32", "fp16", "bf16")
    )
    assert len({fp32, fp16, bf16}) == 3
    monkeypatch.setattr(network_weights, "_VERSION", 0)
    (again,) = weight_groups(NETWORKS["vae_decoder"], tiny_checkpoint, tiny_geometry, Precision.FP32)
    assert again.key != fp32


def test_nothing_is_read_before_a_file_is_written(groups, tiny_checkpoint, tmp_path):
    def fail(names=None):
        raise AssertionError("read")

    parts = {role: dataclasses.replace(getattr(tiny_checkpoint, role), load=fail) for role in ("unet", "adapters")}
    found = groups("denoiser", dataclasses.replace(tiny_checkpoint, **parts))
    assert keys(found) == keys(groups("denoiser"))
    with pytest.raises(AssertionError, match="read"):
        found["unet"].write(tmp_path)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16], ids=lambda p: p.value)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_files_hold_the_modules_state(groups, tiny_checkpoint, tiny_geometry, tmp_path, name, precision):
    module = NETWORKS[name].module(tiny_checkpoint, tiny_geometry, precision)
    found = {}
    for group in groups(name, precision=precision).values():
        # The loaded tensors are mapped from their file, so each group needs a file of its own.
        (tmp_path / group.name).mkdir()
        group.write(tmp_path / group.name)
        found |= load_file(tmp_path / group.name / "weights.safetensors")
    state = module.state_dict()
    assert found.keys() == state.keys()
    for tensor_name, tensor in state.items():
        assert (found[tensor_name].dtype, found[tensor_name].shape) == (tensor.dtype, tensor.shape), tensor_name
        assert torch.equal(found[tensor_name], tensor), tensor_name


def test_linear_weights_are_stored_transposed(groups, tiny_checkpoint, tiny_geometry, tmp_path):
    """As [inputs, outputs], where the checkpoint has [outputs, inputs]; convolutions are unchanged."""
    (group,) = groups("vae_encoder").values()
    group.write(tmp_path)
    found, given = load_file(tmp_path / "weights.safetensors"), tiny_checkpoint.vae.load()
    module = NETWORKS["vae_encoder"].structure(tiny_checkpoint, tiny_geometry)
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Projection)}
    assert linear
    assert not [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    sources = {name: tensor for name, tensor in given.items() if name.startswith(("encoder.", "quant_conv."))}
    assert found.keys() == sources.keys()
    for name, tensor in sources.items():
        assert torch.equal(found[name], tensor.t() if name in linear else tensor), name


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4], ids=lambda p: p.value)
def test_quantized_matrices_are_integers_and_scales(groups, tiny_checkpoint, tmp_path, precision):
    network = NETWORKS["language_model"]
    (group,) = groups("language_model", precision=precision).values()
    group.write(tmp_path)
    found, source = load_file(tmp_path / "weights.safetensors"), network.source(tiny_checkpoint)
    assert source.quantized
    for name in source.quantized:
        expected = quantize(source.read(name), precision, name)
        values = packed_int4(expected.values_kn) if precision is Precision.INT4 else expected.values_kn
        assert found.pop(f"{name}.values").numpy().tobytes() == values.tobytes()
        scales = found.pop(f"{name}.scales")
        assert (scales.dtype, tuple(scales.shape)) == (torch.float16, expected.scales.shape)
        assert scales.numpy().tobytes() == expected.scales.tobytes()
    assert not source.quantized & found.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16], ids=lambda p: p.value)
def test_a_bundle_has_one_unet(tiny_checkpoint, tmp_path, precision):
    plan = ExportPlan(WITH_UNET, Precisions(precision, precision), graphs=False)
    manifest = build_bundle(tiny_checkpoint, plan, tmp_path / "bundle", lambda *_: None).manifest
    held = sum(file.size for name, file in manifest.files.items() if name.startswith("weights/"))
    of_each = {name: sum(manifest.files[f].size for f in entry.weights) for name, entry in manifest.networks.items()}
    (unet,) = {file for entry in manifest.networks.values() for file in entry.weights if "/unet-" in file}
    print(f"{precision.value}: {held} bytes, and {sum(of_each.values())} where each network has its own UNet")
    assert sum(of_each.values()) - held == manifest.files[unet].size > 0.9 * held
    width = 4 if precision is Precision.FP32 else 2
    weights = sum(t.numel() for t in tiny_checkpoint.unet.load().values())
    assert manifest.files[unet].size == pytest.approx(width * weights, rel=0.03)


def test_bundles_share_weights_of_equal_sources(tiny_checkpoint, other_checkpoint, tmp_path):
    """Two bases differ in the UNet, and only a UNet is freed when the bundle of one is deleted."""
    other = dataclasses.replace(tiny_checkpoint, unet=other_checkpoint.unet)
    shared, plan = SharedStore(tmp_path / "store"), ExportPlan(("denoiser", "context_projector"), graphs=False)
    a, b = (
        build_bundle(checkpoint, plan, tmp_path / name, lambda *_: None, shared)
        for name, checkpoint in (("a", tiny_checkpoint), ("b", other))
    )
    files = [
        {Path(f).parent.name.rpartition("-")[0]: f for e in bundle.manifest.networks.values() for f in e.weights}
        for bundle in (a, b)
    ]
    same = {group for group in files[0] if files[0][group] == files[1][group]}
    assert same == {"denoiser", "context_projector"}
    assert all(a.path(files[0][group]).samefile(b.path(files[1][group])) for group in same)
    assert shared.prune() == 0
    for path in sorted((tmp_path / "b").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    unet = files[1]["unet"]
    size = (shared.root / unet).stat().st_size
    assert size <= shared.prune() < size + 4096
    assert not (shared.root / unet).exists()
    assert all((shared.root / file).is_file() for file in files[0].values())


def test_weights_that_no_network_names_are_removed(tiny_checkpoint, other_checkpoint, tmp_path):
    other = dataclasses.replace(tiny_checkpoint, unet=other_checkpoint.unet)
    plan = ExportPlan(("denoiser",), graphs=False)
    before = build_bundle(tiny_checkpoint, plan, tmp_path, lambda *_: None)
    after = build_bundle(other, plan, tmp_path, lambda *_: None)
    assert {str(Path(f)) for f in after.network("denoiser").weights} == {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("weights/*/*.safetensors")
    }
    unet_before, unet_after = (bundle.network("denoiser").weights[0] for bundle in (before, after))
    assert unet_before != unet_after
    assert before.network("denoiser").weights[1] == after.network("denoiser").weights[1]


def test_a_language_models_weight_beyond_the_precision(tiny_checkpoint, tiny_geometry, tmp_path):
    """Its weights are converted one at a time, not with the whole module."""

    def load(names=None):
        state = tiny_checkpoint.language.load(names)
        return {name: tensor.fill_(7e4) if name == "norm.weight" else tensor for name, tensor in state.items()}

    language = dataclasses.replace(tiny_checkpoint.language, load=load)
    checkpoint = dataclasses.replace(tiny_checkpoint, language=language)
    (group,) = weight_groups(NETWORKS["language_model"], checkpoint, tiny_geometry, Precision.INT8)
    with pytest.raises(CheckpointError, match=r"norm\.weight has weights of up to 7e\+04"):
        group.write(tmp_path)
