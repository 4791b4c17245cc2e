"""Checkpoints in the CompVis layout, written from known weights by a separate mapping of names."""

import itertools
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.architectures import check_vae, expected_shapes
from export.checkpoints.compvis_names import unet_names, vae_names
from export.checkpoints.diffusers_folder import read_vae
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE
from export.checkpoints.presets import SD15
from export.checkpoints.single_file import read_single_file
from export.checkpoints.synthetic import random_component
from moma_rt.errors import CheckpointError

ROLES = frozenset({UNET, VAE, TEXT_ENCODER})
CONFIGS = {
    UNET: {**SD15.unet, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64},
    VAE: check_vae({**SD15.vae, "block_out_channels": (32, 32, 32, 64)}, "test"),
    TEXT_ENCODER: {
        **SD15.text_encoder,
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2},
        "vocab_size": 99,
    },
}

# diffusers' modules in the order of CompVis' blocks, which are counted through.
INPUT_BLOCKS = [["conv_in"]]
OUTPUT_BLOCKS = []
for level in range(4):
    for layer in range(2):
        attention = [f"down_blocks.{level}.attentions.{layer}"] if level < 3 else []
        INPUT_BLOCKS.append([f"down_blocks.{level}.resnets.{layer}", *attention])
    if level < 3:
        INPUT_BLOCKS.append([f"down_blocks.{level}.downsamplers.0"])
    for layer in range(3):
        attention = [f"up_blocks.{level}.attentions.{layer}"] if level > 0 else []
        sampler = [f"up_blocks.{level}.upsamplers.0"] if level < 3 and layer == 2 else []
        OUTPUT_BLOCKS.append([f"up_blocks.{level}.resnets.{layer}", *attention, *sampler])
MIDDLE_BLOCK = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
MODULES = {
    **{m: f"input_blocks.{b}.{i}" for b, block in enumerate(INPUT_BLOCKS) for i, m in enumerate(block)},
    **{m: f"output_blocks.{b}.{i}" for b, block in enumerate(OUTPUT_BLOCKS) for i, m in enumerate(block)},
    **{m: f"middle_block.{i}" for i, m in enumerate(MIDDLE_BLOCK)},
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
INSIDE_RESNET = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]
INSIDE_VAE = [
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
]
for level in range(4):
    INSIDE_VAE += [
        (f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample."),
        (f"up_blocks.{level}.upsamplers.0.", f"up.{3 - level}.upsample."),
    ]
    INSIDE_VAE += [(f"down_blocks.{level}.resnets.{i}.", f"down.{level}.block.{i}.") for i in range(2)]
    INSIDE_VAE += [(f"up_blocks.{level}.resnets.{i}.", f"up.{3 - level}.block.{i}.") for i in range(3)]


def compvis_unet_name(name: str) -> str:
    module = max((m for m in MODULES if name.startswith(m + ".")), key=len)
    rest = name.removeprefix(module + ".")
    if "resnets" in module:
        rest = next(old + rest.removeprefix(new) for new, old in INSIDE_RESNET if rest.startswith(new))
    if "downsamplers" in module:
        rest = "op." + rest.removeprefix("conv.")
    return f"{MODULES[module]}.{rest}"


def compvis_vae_name(name: str) -> str:
    for new, old in INSIDE_VAE:
        name = name.replace(new, old)
    return name


def compvis(known) -> dict[str, torch.Tensor]:
    """Return a whole checkpoint, with VAE attention as 1×1 convolutions and the buffers that training saves."""
    unet, vae, text = known[UNET], known[VAE], known[TEXT_ENCODER]
    file = {f"model.diffusion_model.{compvis_unet_name(name)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        is_projection = ".attentions." in name and tensor.dim() == 2
        file[f"first_stage_model.{compvis_vae_name(name)}"] = tensor[..., None, None] if is_projection else tensor
    for name, tensor in text.items():
        file[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    file["scale_factor"] = torch.tensor(0.18215, dtype=torch.float16)
    file["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {**file, "alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9)}


def renamed(file, old: str, new: str):
    return {name.replace(old, new): tensor for name, tensor in file.items()}


def averages(file):
    """The moving averages of the UNet that training adds: names without dots, other values."""
    prefix = "model.diffusion_model."
    return {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): tensor + 1
        for name, tensor in file.items()
        if name.startswith(prefix)
    }


def without(file, *prefixes: str):
    return {name: tensor for name, tensor in file.items() if not name.startswith(prefixes)}


@pytest.fixture(scope="module")
def known():
    return {role: random_component(role, config, 0).load() for role, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def checkpoint(known):
    return compvis(known)


def written(folder, tensors, name="base.safetensors"):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_loads(path, known, vae=None):
    parts = read_single_file(path, vae, ROLES)
    assert_same(parts.unet.load(), known[UNET])
    assert_same(parts.vae.load(), known[VAE])
    assert_same(parts.text_encoder.load(), known[TEXT_ENCODER])
    return parts


def error_of(path, roles=ROLES) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_single_file(path, None, roles)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


VARIANTS = {
    "plain": lambda file: file,
    "half": lambda file: {n: t.half() if t.is_floating_point() else t for n, t in file.items()},
    "no text_model prefix": lambda file: renamed(file, "transformer.text_model.", "transformer."),
    "linear VAE attention": lambda file: {
        n: t[..., 0, 0] if "attn_1" in n and t.dim() == 4 else t for n, t in file.items()
    },
    "VAE attention as diffusers names it": lambda file: {
        re.sub(r"attn_1\.(q|k|v)\.", r"attn_1.to_\1.", n).replace("attn_1.proj_out.", "attn_1.to_out.0."): t
        for n, t in file.items()
    },
    "VAE attention as diffusers named it": lambda file: {
        n.replace("1.q.", "1.query.").replace("1.k.", "1.key.").replace("1.v.", "1.value."): t for n, t in file.items()
    },
    "linear projections": lambda file: {
        n: t[..., 0, 0] if n.endswith(("proj_in.weight", "1.proj_out.weight")) and t.dim() == 4 else t
        for n, t in file.items()
    },
    "CLIP's heads": lambda file: {
        **file,
        "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
        "cond_stage_model.transformer.logit_scale": torch.ones(()),
        "cond_stage_model.transformer.vision_model.pre_layrnorm.weight": torch.ones(3),
    },
    "text encoder without its class": lambda file: renamed(file, "cond_stage_model.transformer.", "cond_stage_model."),
    "text encoder as in folders": lambda file: renamed(file, "cond_stage_model.transformer.", "text_encoder."),
    "text encoder, shortest": lambda file: renamed(file, "cond_stage_model.transformer.text_model.", "text_encoder."),
    "torch.compile": lambda file: renamed(file, "model.diffusion_model.", "model.diffusion_model._orig_mod."),
    "data parallel": lambda file: {f"module.{n}": t for n, t in file.items()},
    "EMA beside": lambda file: {**file, **averages(file)},
    "VAE's training": lambda file: {
        **file,
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2),
        "first_stage_model.model_ema.num_updates": torch.ones(()),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_weights_whatever_the_variant(tmp_path, known, checkpoint, variant):
    change = VARIANTS[variant]
    expected = {role: change(state) for role, state in known.items()} if variant == "half" else known
    parts = assert_loads(written(tmp_path, change(checkpoint)), expected)
    assert parts.unet.config["block_out_channels"] == (32, 32, 64, 64)
    assert parts.tokenizer is None


class Callback:
    """An object that a trainer pickles beside the weights."""


NESTINGS = {
    "state_dict": lambda file: {"state_dict": file, "global_step": 840000, "epoch": 7},
    "object of a trainer": lambda file: {"state_dict": file, "callbacks": {Callback: Callback()}},
    "twice": lambda file: {"state_dict": {"state_dict": file}},
    "optimizer of tensors": lambda file: {
        "state_dict": file,
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
    },
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_ckpt(tmp_path, known, checkpoint, nesting):
    whole = written(tmp_path, NESTINGS[nesting](checkpoint), "base.ckpt")
    assert_loads(whole, known)


def test_only_moving_averages(tmp_path, known, checkpoint):
    file = {**without(checkpoint, "model.diffusion_model."), **averages(checkpoint)}
    expected = {**known, UNET: {name: tensor + 1 for name, tensor in known[UNET].items()}}
    assert_loads(written(tmp_path, file), expected)


def test_no_vae(tmp_path, known, checkpoint):
    path = written(tmp_path, without(checkpoint, "first_stage_model."))
    assert "no VAE" in error_of(path)
    assert "--vae" in error_of(path)
    assert read_single_file(path, None, frozenset({UNET})).vae.config["scaling_factor"] == 0.18215
    alone = {
        n.removeprefix("first_stage_model."): t for n, t in checkpoint.items() if n.startswith("first_stage_model.")
    }
    for name, tensors in (
        ("vae.pt", {"state_dict": alone}),
        ("vae.safetensors", alone),
        ("diffusion_pytorch_model.safetensors", known[VAE]),
        ("wrapped.safetensors", {f"vae.{name}": tensor for name, tensor in known[VAE].items()}),
        ("whole.safetensors", checkpoint),
    ):
        vae = read_vae(written(tmp_path, tensors, name), ROLES)
        assert_same(vae.load(), known[VAE])
    assert_loads(path, known, vae)
    assert "no VAE" in str(pytest.raises(CheckpointError, read_vae, path, ROLES).value)


def test_no_text_encoder(tmp_path, checkpoint):
    path = written(tmp_path, without(checkpoint, "cond_stage_model."))
    assert "no text encoder" in error_of(path)
    parts = read_single_file(path, None, frozenset({UNET, VAE}))
    with pytest.raises(CheckpointError, match="not asked for"):
        parts.text_encoder.load()


UNET_NAME = "model.diffusion_model."
CROSS = f"{UNET_NAME}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "SDXL": {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(2)},
    "SDXL ": {f"{UNET_NAME}label_emb.0.0.weight": torch.ones(2, 2)},
    "Stable Diffusion 2": {"cond_stage_model.model.ln_final.bias": torch.ones(2)},
    "has scale_factor 0.3": {"scale_factor": torch.tensor(0.3)},
    "Stable Diffusion 2 ": {CROSS: torch.ones(32, 1024)},
    "inpainting": {f"{UNET_NAME}input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)},
    "v_prediction": {"v_pred": torch.ones(0)},
    "unexpected time_embed.9": {f"{UNET_NAME}time_embed.9": torch.ones(2)},
    "time_embedding.linear_1.bias is [2]": {f"{UNET_NAME}time_embed.0.bias": torch.ones(2)},
    "takes 64": {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(99, 32)},
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_models(tmp_path, checkpoint, said):
    assert said.strip() in error_of(written(tmp_path, {**checkpoint, **OTHERS[said]}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(())}, "--lora"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)}, "diffusers folder"),
        ({"hello": torch.ones(2)}, "no model.diffusion_model.* but hello"),
        ({}, "but nothing"),
    ],
)
def test_other_files(tmp_path, tensors, said):
    assert said in error_of(written(tmp_path, tensors, "some.safetensors"))


def test_missing_tensors_are_named_as_diffusers_names_them(tmp_path, checkpoint):
    path = written(tmp_path, without(checkpoint, f"{UNET_NAME}out.2.bias"))
    assert "missing conv_out.bias" in error_of(path)


def test_parts_are_identified_by_their_own_tensors(tmp_path, checkpoint):
    before = read_single_file(written(tmp_path, checkpoint, "a.safetensors"), None, ROLES)
    changed = {**checkpoint, f"{UNET_NAME}out.2.bias": torch.ones(4)}
    after = read_single_file(written(tmp_path, {"state_dict": changed}, "b.ckpt"), None, ROLES)
    assert after.unet.sha256 != before.unet.sha256
    assert after.vae.sha256 == before.vae.sha256
    assert after.text_encoder.sha256 == before.text_encoder.sha256
    assert len({before.unet.sha256, before.vae.sha256, before.text_encoder.sha256}) == 3


def test_real_sizes_are_read_from_the_shapes(tmp_path, monkeypatch):
    """A file of SD1.5's own shapes gives SD1.5's own configs (no memory: the tensors are never read)."""
    from export.checkpoints import single_file
    from export.checkpoints.weights import Weights

    shapes = {role: expected_shapes(role, dict(getattr(SD15, role)), "preset") for role in CONFIGS}
    file = {f"{UNET_NAME}{compvis_unet_name(n)}": shapes[UNET][n] for n in shapes[UNET]}
    file |= {f"first_stage_model.{compvis_vae_name(n)}": shapes[VAE][n] for n in shapes[VAE]}
    file |= {f"cond_stage_model.transformer.text_model.{n}": shapes[TEXT_ENCODER][n] for n in shapes[TEXT_ENCODER]}
    weights = Weights(tmp_path / "base.ckpt", (), {}, file)
    monkeypatch.setattr(single_file, "open_weights", lambda path: weights)
    monkeypatch.setattr(single_file, "tensors_hash", lambda tensors: "")
    monkeypatch.setattr(Weights, "read", lambda self, names: {n: torch.empty(file[n], device="meta") for n in names})
    parts = read_single_file(weights.location, None, ROLES)
    for role, component in ((UNET, parts.unet), (VAE, parts.vae), (TEXT_ENCODER, parts.text_encoder)):
        for key, value in getattr(SD15, role).items():
            assert component.config[key] == value, (role, key)


def test_names_agree_with_diffusers(checkpoint):
    from diffusers.loaders import single_file_utils as library

    for prefix, names, convert, role in (
        (UNET_NAME, unet_names, library.convert_ldm_unet_checkpoint, UNET),
        ("first_stage_model.", vae_names, library.convert_ldm_vae_checkpoint, VAE),
    ):
        converted = convert(checkpoint, CONFIGS[role])
        own = names(expected_shapes(role, CONFIGS[role], "test"))
        assert len(own) == len(converted)
        for old, new in own.items():
            stored = checkpoint[prefix + old]
            assert torch.equal(converted[new], stored.reshape(converted[new].shape)), new


def test_a_file_as_a_base_or_as_the_weights_of_a_named_base(tmp_path, original, checkpoint):
    """CLIP's tokenizer is beside the file, or in --vision's folder."""
    path = written(tmp_path, checkpoint, "mine.safetensors")
    given = {"weights": "random", "roles": ROLES}
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_checkpoint(CheckpointRequest(str(path), **given))
    vision = tmp_path / "clip"
    shutil.copytree(original.base / "tokenizer", vision)
    found = load_checkpoint(CheckpointRequest(str(path), **given, vision=vision))
    assert (found.base, found.text_tokenizer) == ("mine", vision)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(vision / "vocab.json", tmp_path / "tokenizer")
    found = load_checkpoint(CheckpointRequest(str(path), **given, vision=vision))
    assert found.text_tokenizer == vision, "the folder beside the file has no merges.txt"
    shutil.copytree(vision, tmp_path / "tokenizer", dirs_exist_ok=True)
    found = load_checkpoint(CheckpointRequest(str(path), **given))
    assert found.text_tokenizer == tmp_path / "tokenizer"
    named = load_checkpoint(CheckpointRequest("rev_animated", weights=str(path), roles=ROLES))
    assert named.base == "rev_animated"
    assert [c.sha256 for c in named.components] == [c.sha256 for c in found.components]
    assert [c.name for c in itertools.islice(named.components, 1)] == ["mine"]
