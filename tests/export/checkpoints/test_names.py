"""Names as trainers, converters and versions of the libraries write them, in folders; single files have their own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.diffusers_folder import read_base, read_vae
from export.checkpoints.llava import read_vision
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, VISION
from export.checkpoints.names import bare, renaming, unwrapped
from moma_rt.errors import CheckpointError, MomaWarning
from tests.export.checkpoints.test_single_file import compvis_unet_name, compvis_vae_name

ROLES = frozenset({UNET, VAE, TEXT_ENCODER})
FILES = {
    UNET: "unet/diffusion_pytorch_model.safetensors",
    VAE: "vae/diffusion_pytorch_model.safetensors",
    TEXT_ENCODER: "text_encoder/model.safetensors",
}
ONE = torch.ones(1)


@pytest.fixture
def whole(copy):
    """The golden base with a VAE of its own."""
    (copy.base / "vae").mkdir(exist_ok=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        copy.replace(copy.base / "vae" / name, (copy.vae / name).read_bytes())
    return copy


def states(base):
    return {UNET: base.unet.load(), VAE: base.vae.load(), TEXT_ENCODER: base.text_encoder.load()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def prefixed(start: str):
    return lambda role, tensors: {f"{start}{name}": tensor for name, tensor in tensors.items()}


EXTRA = {
    UNET: {"betas": ONE, "sqrt_recipm1_alphas_cumprod": ONE, "model_ema.conv_in.weight": ONE},
    VAE: {"loss.discriminator.main.0.weight": ONE, "model_ema.num_updates": ONE, "logvar": ONE},
    TEXT_ENCODER: {
        "logit_scale": ONE,
        "text_projection": ONE,
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.pre_layrnorm.weight": ONE,
    },
}
COMPVIS = {UNET: compvis_unet_name, VAE: compvis_vae_name, TEXT_ENCODER: str}
PREFIXES = {
    UNET: "model.diffusion_model.",
    VAE: "first_stage_model.",
    TEXT_ENCODER: "cond_stage_model.transformer.text_model.",
}
WRITTEN = {
    "data parallel": prefixed("module."),
    "lightning": prefixed("model."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "inside a state_dict": prefixed("state_dict.model."),
    "training leftovers": lambda role, tensors: {**tensors, **EXTRA[role]},
    "CompVis' names": lambda role, tensors: {
        f"{PREFIXES[role]}{COMPVIS[role](name.removeprefix('text_model.'))}": t for name, t in tensors.items()
    },
    "1×1 as either": lambda role, tensors: {
        n: t[..., 0, 0] if t.shape[2:] == (1, 1) else t[..., None, None] if t.dim() == 2 and role == VAE else t
        for n, t in tensors.items()
    },
}


@pytest.mark.parametrize("way", WRITTEN)
def test_folders_hold_the_same_whatever_the_names(whole, way):
    expected = states(read_base(whole.base, None, ROLES))
    for role, file in FILES.items():
        path = whole.base / file
        renamed = {n: t.contiguous().clone() for n, t in WRITTEN[way](role, load_file(path)).items()}
        whole.save(path, lambda path, tensors=renamed: save_file(tensors, path))
    found = states(read_base(whole.base, None, ROLES))
    for role in FILES:
        assert_same(found[role], expected[role])


def test_a_folder_with_a_training_checkpoint(whole):
    expected = read_base(whole.base, None, ROLES).unet.load()
    file = whole.base / FILES[UNET]
    torch.save({"state_dict": load_file(file), "epoch": 3}, file.with_suffix(".bin"))
    file.unlink()
    assert_same(read_base(whole.base, None, ROLES).unet.load(), expected)


@pytest.mark.parametrize("variant", ["non_ema", "ema", "bf16"])
def test_a_folder_with_another_variant_only(whole, variant):
    expected = read_base(whole.base, None, ROLES).unet.load()
    file = whole.base / FILES[UNET]
    file.rename(file.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    assert_same(read_base(whole.base, None, ROLES).unet.load(), expected)


def test_a_vae_given_by_its_file_in_diffusers_layout(copy):
    expected = read_vae(copy.vae, ROLES)
    found = read_vae(copy.vae / "diffusion_pytorch_model.safetensors", ROLES)
    assert_same(found.load(), expected.load())
    assert found.config["norm_num_groups"] == expected.config["norm_num_groups"]


def test_linear_projections_in_the_config(copy):
    expected = read_base(copy.base, copy.vae, ROLES).unet.load()
    copy.edit_json(copy.base / "unet/config.json", use_linear_projection=True)
    file = copy.base / FILES[UNET]
    tensors = {
        n: t[..., 0, 0] if n.endswith(("proj_in.weight", "proj_out.weight")) else t for n, t in load_file(file).items()
    }
    copy.save(file, lambda path: save_file({n: t.contiguous() for n, t in tensors.items()}, path))
    assert_same(read_base(copy.base, copy.vae, ROLES).unet.load(), expected)


def with_more_layers(copy, file, prefix: str, count: int) -> None:
    """Store `count` more layers than the config names."""
    tensors = load_file(file)
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in tensors if "layers." in name)
    for number in range(last + 1, last + 1 + count):
        for name in [n for n in tensors if f"{prefix}layers.{last}." in n]:
            tensors[name.replace(f"layers.{last}.", f"layers.{number}.")] = torch.full_like(tensors[name], 9.0)
    copy.save(file, lambda path: save_file(tensors, path))


def test_clip_skip_as_transformers_reads_it(copy):
    from transformers import CLIPTextModel

    expected = read_base(copy.base, copy.vae, ROLES).text_encoder.load()
    with_more_layers(copy, copy.base / FILES[TEXT_ENCODER], "encoder.", 2)
    theirs = CLIPTextModel.from_pretrained(copy.base / "text_encoder").state_dict()
    with pytest.warns(MomaWarning, match=r"has 3 layers; only the first 1 are used, as its config.json says"):
        found = read_base(copy.base, copy.vae, ROLES).text_encoder.load()
    assert_same(found, expected)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name].float(), theirs[name].float()) for name in found)


def test_more_layers_than_are_stored(copy):
    copy.edit_json(copy.base / "text_encoder/config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"missing .*encoder\.layers\.1\."):
        read_base(copy.base, copy.vae, ROLES)
    for count in (0, -1, "1", 1.5, True):
        copy.edit_json(copy.base / "text_encoder/config.json", num_hidden_layers=count)
        with pytest.raises(CheckpointError, match="num_hidden_layers .*; it must be a positive integer"):
            read_base(copy.base, copy.vae, ROLES)


def test_a_vision_encoder_with_more_layers_than_its_config_names(copy):
    expected = read_vision(copy.clip).load()
    with_more_layers(copy, copy.clip / "model.safetensors", "encoder.", 1)
    assert_same(read_vision(copy.clip).load(), expected)


def test_another_pipelines_folder_with_the_networks_of_sd15(copy):
    copy.edit_json(copy.base / "model_index.json", _class_name="StableDiffusionControlNetPipeline")
    assert read_base(copy.base, copy.vae, ROLES).unet.load()


def test_what_messages_say_is_true_of_the_file(copy):
    """A model of 1.5's own sizes may predict v, and another VAE's factor tells nothing of its origin."""
    copy.edit_json(copy.base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(CheckpointError) as caught:
        read_base(copy.base, copy.vae, ROLES)
    assert "scheduler_config.json has prediction_type 'v_prediction'" in str(caught.value)
    assert "Stable Diffusion 2" not in str(caught.value)
    copy.edit_json(copy.vae / "config.json", scaling_factor=0.2)
    with pytest.raises(CheckpointError, match=r"has scaling_factor 0\.2; Stable Diffusion 1\.5's VAE has 0\.18215"):
        read_vae(copy.vae, ROLES)
    assert json.loads((copy.vae / "config.json").read_text())["scaling_factor"] == 0.2


@pytest.mark.parametrize(
    ("role", "stored", "name"),
    [
        (UNET, "unet.conv_in.weight", "conv_in.weight"),
        (UNET, "alphas_cumprod_prev", None),
        (VAE, "vae.encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        (VAE, "first_stage_model.encoder.mid.attn_1.norm.weight", "encoder.mid.attn_1.group_norm.weight"),
        (VAE, "decoder.mid.attn_1.to_out.0.weight", "decoder.mid.attn_1.to_out.0.weight"),
        (TEXT_ENCODER, "text_encoder.text_model.final_layer_norm.bias", "final_layer_norm.bias"),
        (TEXT_ENCODER, "cond_stage_model.transformer.text_projection.weight", None),
        (VISION, "model.vision_tower.vision_tower.vision_model.encoder.x", "encoder.x"),
        (VISION, "text_model.encoder.x", None),
        (VISION, "strange.x", "strange.x"),
    ],
)
def test_bare_names(role, stored, name):
    assert bare(role, stored) == name


def test_wrappers_are_removed_only_if_all_names_have_them():
    assert unwrapped(["module.a", "module.b"]) == {"a": "module.a", "b": "module.b"}
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert unwrapped(["x._orig_mod.a"]) == {"x.a": "x._orig_mod.a"}
    assert unwrapped(["lora_unet__orig_mod_a.alpha"]) == {"lora_unet_a.alpha": "lora_unet__orig_mod_a.alpha"}
    clash = ["_orig_mod.a", "a"]
    assert unwrapped(clash) == {name: name for name in clash}
    assert unwrapped([]) == {}


def test_names_of_other_networks_are_not_read():
    rename = renaming(UNET, {"out.0.bias": "conv_norm_out.bias"}, "model.diffusion_model.")
    assert rename("model.diffusion_model.out.0.bias") == "conv_norm_out.bias"
    assert rename("first_stage_model.out.0.bias") is None
