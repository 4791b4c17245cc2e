"""What the keys of graphs and of packages depend on, and what they do not."""

import dataclasses

import pytest

from export import keys
from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint
from export.keys import network_key, structure_key
from export.networks import NETWORKS
from moma_rt.bundle.specs import Precision


def changed(checkpoint, role, config=None, **fields):
    """Return the checkpoint's components, with keys of the config or fields of one role's component replaced."""

    def change(component):
        if component.role != role:
            return component
        return dataclasses.replace(component, config={**component.config, **(config or {})}, **fields)

    return tuple(map(change, checkpoint.components))


@pytest.fixture(scope="module")
def other_seed():
    return load_checkpoint(CheckpointRequest("tiny", seed=1))


@pytest.mark.parametrize("name", NETWORKS)
def test_two_seeds_have_one_structure(tiny_checkpoint, other_seed, tiny_geometry, name):
    spec = NETWORKS[name].spec(tiny_geometry)
    structures = {structure_key(c.components, spec, Precision.FP32) for c in (tiny_checkpoint, other_seed)}
    assert len(structures) == 1
    assert len({network_key(c.components, spec, Precision.FP32) for c in (tiny_checkpoint, other_seed)}) == 2


def test_every_network_has_a_structure_of_its_own(tiny_checkpoint, tiny_geometry):
    found = {
        structure_key(tiny_checkpoint.components, n.spec(tiny_geometry), Precision.FP32) for n in NETWORKS.values()
    }
    assert len(found) == len(NETWORKS)


SAME = [
    ("unet", {"_name_or_path": "runwayml/stable-diffusion-v1-5"}),
    ("unet", {"_diffusers_version": "0.6.0"}),
    ("unet", {"_class_name": "UNet2DConditionModel"}),
    # The defaults of the class.
    ("unet", {"act_fn": "silu", "norm_eps": 1e-5, "freq_shift": 0, "flip_sin_to_cos": True}),
    ("vae", {"_name_or_path": "stabilityai/sd-vae-ft-mse", "_diffusers_version": "0.2.2"}),
    ("vae", {"act_fn": "silu", "sample_size": 256, "force_upcast": True}),
    ("text_encoder", {"projection_dim": 768, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}),
    ("text_encoder", {"torch_dtype": "float16", "dtype": "float16"}),
    ("text_encoder", {"transformers_version": "4.21.0", "architectures": ["CLIPTextModel"]}),
    ("text_encoder", {"_name_or_path": "openai/clip-vit-large-patch14", "model_type": "clip_text_model"}),
    ("text_encoder", {"layer_norm_eps": 1e-5}),
    ("language", {"_name_or_path": "liuhaotian/llava", "torch_dtype": "bfloat16"}),
    ("vision", {"torch_dtype": "float32", "architectures": ["CLIPVisionModel"]}),
]


@pytest.mark.parametrize(("role", "config"), SAME, ids=[f"{role}-{'-'.join(config)}" for role, config in SAME])
def test_origin_and_defaults_of_a_config_are_not_part_of_a_structure(tiny_checkpoint, tiny_geometry, role, config):
    for name in (name for name in NETWORKS if role in NETWORK_ROLES[name]):
        spec = NETWORKS[name].spec(tiny_geometry)
        before = structure_key(tiny_checkpoint.components, spec, Precision.FP32)
        components = changed(tiny_checkpoint, role, config, name="renamed")
        assert structure_key(components, spec, Precision.FP32) == before, name


OTHER = [
    ("unet", {"block_out_channels": (32, 64, 128, 128)}),
    ("unet", {"norm_eps": 1e-6}),
    ("unet", {"act_fn": "gelu"}),
    ("unet", {"flip_sin_to_cos": False}),
    ("vae", {"act_fn": "relu"}),
    ("vae", {"scaling_factor": 0.5}),
    ("text_encoder", {"hidden_act": "gelu"}),
    ("text_encoder", {"layer_norm_eps": 1e-6}),
    ("text_encoder", {"intermediate_size": 256}),
    ("language", {"rms_norm_eps": 1e-3}),
    ("language", {"rope_theta": 5e5}),
    ("vision", {"hidden_act": "gelu"}),
    ("adapters", {"anything": 1}),
]


@pytest.mark.parametrize(("role", "config"), OTHER, ids=[f"{role}-{'-'.join(config)}" for role, config in OTHER])
def test_other_settings_of_a_config_are_another_structure(tiny_checkpoint, tiny_geometry, role, config):
    """Only of the networks that are made of the component."""
    components = changed(tiny_checkpoint, role, config)
    for name, network in NETWORKS.items():
        spec = network.spec(tiny_geometry)
        before, after = (structure_key(c, spec, Precision.FP32) for c in (tiny_checkpoint.components, components))
        assert (after != before) == (role in NETWORK_ROLES[name]), name


@pytest.mark.parametrize("key", [network_key, structure_key])
def test_precision_code_and_libraries_are_part_of_both(monkeypatch, tiny_checkpoint, tiny_geometry, key):
    spec = NETWORKS["vae_decoder"].spec(tiny_geometry)

    def found(precision=Precision.FP32, components=tiny_checkpoint.components):
        return key(components, spec, precision)

    first = found()
    assert found() == first
    assert found(components=changed(tiny_checkpoint, "vae", name="renamed")) == first
    assert found(Precision.BF16) != first, "the same tensors, another arithmetic"
    with monkeypatch.context() as patch:
        patch.setattr(keys, "_code_hash", lambda names: "other code")
        assert found() != first
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda _: "0")
        assert found() != first


def test_sources_are_part_of_the_network_key_only(tiny_checkpoint, tiny_geometry):
    spec = NETWORKS["vae_decoder"].spec(tiny_geometry)
    components = changed(tiny_checkpoint, "vae", sha256="0" * 64)
    pairs = [[key(c, spec, Precision.FP32) for c in (tiny_checkpoint.components, components)] for key in KEYS]
    assert [first == second for first, second in pairs] == [False, True]


KEYS = (network_key, structure_key)


def test_every_file_that_affects_a_graph_is_hashed(repository):
    """If a file were missing from the list, its changes would leave outdated graphs in bundles."""
    hashed = {*keys._CODE, *keys._GRAPH_CODE}
    for name in hashed:
        assert (repository / name).exists(), name
    modules = {path.relative_to(repository).as_posix() for path in (repository / "export").glob("*.py")}
    # The command line, files that do not affect a graph, and files that other keys hash.
    others = {"__init__", "attention_kernels", "bases", "build", "bundling", "compare", "inductor_export", "keys"}
    others |= {"host_compiler", "packages", "progress", "sample_inputs", "tokenizers", "torch_runs"}
    # The first is of tokenizers; the second chooses a precision, which is hashed.
    others |= {"added_tokens", "overflow"}
    assert modules - {f"export/{name}.py" for name in others} == {name for name in hashed if name in modules}


def test_libraries_that_only_write_a_graph_are_not_part_of_a_structure(monkeypatch, tiny_checkpoint, tiny_geometry):
    spec = NETWORKS["vae_decoder"].spec(tiny_geometry)
    version = keys.importlib.metadata.version

    def found():
        return [key(tiny_checkpoint.components, spec, Precision.FP32) for key in KEYS]

    before = found()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0" if "onnx" in name else version(name))
    assert [first == second for first, second in zip(before, found(), strict=True)] == [False, True]
    monkeypatch.setattr("importlib.metadata.version", lambda name: version(name).partition("+")[0] + "+cu130")
    assert found() == before, "a build of the same version for another device"
