import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.architectures import attention_layers, check_unet
from export.checkpoints.diffusers_folder import read_base, read_vae
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE
from export.checkpoints.presets import SD15, TINY
from moma_rt.errors import CheckpointError

ROLES = frozenset({UNET, VAE, TEXT_ENCODER})


def error_of(*args) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_base(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_values_and_strict_loading(original):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    base = read_base(original.base, original.vae, ROLES)
    assert_same(base.unet.load(), load_file(original.base / "unet/diffusion_pytorch_model.safetensors"))
    assert_same(base.vae.load(), load_file(original.vae / "diffusion_pytorch_model.safetensors"))
    stored = load_file(original.base / "text_encoder/model.safetensors")
    found = base.text_encoder.load()
    assert len(found) == len(stored)
    assert all(torch.equal(found[name.removeprefix("text_model.")], tensor) for name, tensor in stored.items())
    UNet2DConditionModel.from_config(base.unet.config).load_state_dict(base.unet.load(), strict=True)
    AutoencoderKL.from_config(base.vae.config).load_state_dict(base.vae.load(), strict=True)
    CLIPTextModel(CLIPTextConfig(**base.text_encoder.config)).load_state_dict(found, strict=True)
    assert base.tokenizer == original.base / "tokenizer"
    assert (base.unet.name, base.vae.name) == (original.base.name, original.vae.name)
    assert base.vae.config["scaling_factor"] == 0.18215


def test_bin_and_fp16_variants_hold_the_same(copy):
    base = read_base(copy.base, None, ROLES)
    expected_unet, expected_text = base.unet.load(), base.text_encoder.load()
    unet = copy.base / "unet/diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    text = copy.base / "text_encoder/model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    found = read_base(copy.base, None, ROLES)
    assert_same(found.unet.load(), expected_unet)
    assert_same(found.text_encoder.load(), expected_text)


def test_old_vae_attention_names(copy):
    before = read_vae(copy.vae, ROLES)
    expected = before.load()
    file = copy.vae / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(file).items():
        for new_part, old_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".attentions.0.{new_part}." in name:
                name = name.replace(new_part, old_part)
                tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    copy.save(file, lambda path: save_file(old, path))
    found = read_vae(copy.vae, ROLES)
    assert_same(found.load(), expected)
    assert found.sha256 != before.sha256


def test_text_encoder_from_a_full_clip_file(copy):
    expected = read_base(copy.base, None, ROLES).text_encoder.load()
    file = copy.base / "text_encoder/model.safetensors"
    extra = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.pre_layrnorm.weight": torch.ones(3),
        "logit_scale": torch.ones(()),
        "text_projection.weight": torch.ones(2, 2),
    }
    full = {**load_file(file), **extra}
    copy.save(file, lambda path: save_file(full, path))
    assert_same(read_base(copy.base, None, ROLES).text_encoder.load(), expected)


def test_missing_tokenizer(copy):
    (copy.base / "tokenizer/merges.txt").unlink()
    assert "no tokenizer: looked for vocab.json with merges.txt, and tok" in error_of(copy.base, copy.vae, ROLES)
    shutil.rmtree(copy.base / "tokenizer")
    assert "no tokenizer" in error_of(copy.base, copy.vae, ROLES)


def test_only_requested_roles_are_opened(copy):
    shutil.rmtree(copy.base / "vae")
    shutil.rmtree(copy.base / "tokenizer")
    copy.truncate(copy.base / "text_encoder/model.safetensors")
    base = read_base(copy.base, None, frozenset({UNET}))
    assert base.tokenizer is None
    assert base.vae.config["block_out_channels"] == SD15.vae["block_out_channels"]
    assert base.text_encoder.config["hidden_size"] == 768
    with pytest.raises(CheckpointError, match="not asked for"):
        base.text_encoder.load()
    assert "--vae" in error_of(copy.base, None, frozenset({VAE}))
    assert "truncated" in error_of(copy.base, copy.vae, ROLES)


UNET_CHANGES = [
    ({"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "SDXL"),
    ({"cross_attention_dim": 2048}, "SDXL"),
    ({"cross_attention_dim": 1024}, "Stable Diffusion 2"),
    ({"in_channels": 9}, "inpainting"),
    ({"in_channels": 8}, "instruction-editing"),
    ({"in_channels": 5}, "another architecture"),
    ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
    ({"layers_per_block": 1}, "layers_per_block"),
    ({"down_block_types": ["DownBlock2D"] * 4}, "down_block_types"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
    ({"block_out_channels": [32, 64]}, "block_out_channels"),
    ({"block_out_channels": None}, "block_out_channels"),
    ({"cross_attention_dim": [768, 768, 768, 768]}, "cross_attention_dim"),
    ({"sample_size": "big"}, "sample_size"),
    ({"attention_head_dim": -8}, "attention_head_dim -8"),
    ({"attention_head_dim": [5, 10, 20, True]}, "attention_head_dim"),
    ({"freq_shift": float("nan")}, "freq_shift nan"),
    ({"norm_num_groups": 7}, "usable unet"),
    ({"block_out_channels": [16, 32, 32, 64]}, "does not fit"),
]


@pytest.mark.parametrize(("changes", "said"), UNET_CHANGES, ids=[said for _, said in UNET_CHANGES])
def test_other_unets(copy, changes, said):
    copy.edit_json(copy.base / "unet/config.json", **changes)
    assert said in error_of(copy.base, None, ROLES)


def test_other_pipelines_and_predictions(copy):
    index = copy.base / "model_index.json"
    copy.edit_json(index, _class_name="StableDiffusionXLPipeline")
    assert "SDXL" in error_of(copy.base, None, ROLES)
    copy.edit_json(index, _class_name="FluxPipeline")
    (copy.base / "unet/config.json").rename(copy.base / "unet/other.json")
    assert "FluxPipeline" in error_of(copy.base, None, ROLES)
    (copy.base / "unet/other.json").rename(copy.base / "unet/config.json")
    copy.edit_json(index, _class_name="StableDiffusionPipeline")
    copy.edit_json(copy.base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert "v_prediction" in error_of(copy.base, None, ROLES)


def test_other_vaes_and_text_encoders(copy):
    config = copy.vae / "config.json"
    good = json.loads(config.read_text())
    for changes, said in (
        ({"scaling_factor": 0.13025}, "SDXL"),
        ({"latent_channels": 16}, "latent_channels"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"block_out_channels": [8, 16]}, "factor 8"),
    ):
        copy.edit_json(config, **{**good, **changes})
        assert said in error_of(copy.base, copy.vae, ROLES)
    config = copy.base / "text_encoder/config.json"
    good = json.loads(config.read_text())
    for changes, said in (
        ({"hidden_size": 1024}, "width 1024"),
        ({"model_type": "t5"}, "t5"),
        ({"max_position_embeddings": 248}, "248"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_attention_heads": 7}, "is not a multiple of the number of attention heads (7)"),
    ):
        copy.edit_json(config, **{**good, **changes})
        assert said in error_of(copy.base, None, ROLES)


def test_damaged_and_missing_files(copy, tmp_path):
    file = copy.base / "unet/diffusion_pytorch_model.safetensors"
    assert "not a folder" in error_of(tmp_path / "none", None, ROLES)
    assert "not a diffusers folder" in error_of(copy.vae, None, ROLES)
    tensors = load_file(file)
    copy.truncate(file)
    assert "truncated" in error_of(copy.base, None, ROLES)
    tensors["extra.weight"] = tensors.pop("conv_in.weight")
    copy.save(file, lambda path: save_file(tensors, path))
    message = error_of(copy.base, None, ROLES)
    assert "missing conv_in.weight" in message
    assert "unexpected extra.weight" in message
    file.unlink()
    assert "looked for" in error_of(copy.base, None, ROLES)
    copy.replace(copy.base / "unet/config.json", b"{")
    assert "JSON" in error_of(copy.base, None, ROLES)
    with pytest.raises(CheckpointError, match="--vae takes"):
        read_vae(file, ROLES)


def test_attention_layers_in_the_adapters_order(goldens, original):
    from diffusers import UNet2DConditionModel

    expected = json.loads((goldens / "attn_processor_index_tiny.json").read_text())
    config = check_unet(json.loads((original.base / "unet/config.json").read_text()), "config")
    layers = attention_layers(config)
    assert [f"{layer.path}.processor" for layer in layers] == [expected[str(i)] for i in range(len(expected))]
    assert all(layer.is_self == (index % 2 == 0) for index, layer in enumerate(layers))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(TINY.unet))
    for layer in attention_layers(TINY.unet):
        module = unet.get_submodule(layer.path)
        assert (module.inner_dim, module.heads) == (layer.channels, layer.heads)
    assert list(unet.attn_processors) == [f"{layer.path}.processor" for layer in attention_layers(TINY.unet)]
    assert [layer.channels for layer in attention_layers(SD15.unet)][::4] == [320, 640, 1280, 1280, 1280, 640, 320, 320]


def test_heads_given_per_level_or_by_their_newer_name():
    per_level = {**SD15.unet, "attention_head_dim": [5, 10, 20, 20]}
    assert [layer.heads for layer in attention_layers(per_level)][::6] == [5, 10, 20, 10, 5, 20]
    assert {layer.heads for layer in attention_layers({**SD15.unet, "num_attention_heads": 4})} == {4}


def test_a_device_as_vae_is_not_said_to_be_missing():
    with pytest.raises(CheckpointError, match=f"^{os.devnull} is neither a file nor a folder; --vae takes a folder"):
        read_vae(Path(os.devnull), frozenset({"vae"}))
