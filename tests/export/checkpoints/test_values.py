"""NaN, infinity and overflow, in every dtype that checkpoints have, and in every file that a build reads."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.adapters import read_adapters
from export.checkpoints.architectures import check_text_encoder, check_unet, check_vae
from export.checkpoints.diffusers_folder import read_base, read_vae
from export.checkpoints.llava import read_language, read_language_config, read_vision, read_vision_config
from export.checkpoints.lora import LoraFile, fuse_loras
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE
from export.checkpoints.presets import SD15
from export.checkpoints.values import check_finite, check_floating, converted
from moma_rt.errors import CheckpointError

ROLES = frozenset({UNET, VAE, TEXT_ENCODER})
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
FAULTS = {"NaN": math.nan, "infinity": -math.inf}


def error_of(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 2, 3, 3)])
def test_one_bad_value(dtype, shape, fault):
    good = torch.ones(shape)
    bad = good.clone()
    bad.view(-1)[-1] = FAULTS[fault]
    check_finite({"good": good.to(dtype)}, "file")
    assert f"file has {fault} in bad" in error_of(check_finite, {"good": good.to(dtype), "bad": bad.to(dtype)}, "file")


def test_a_bad_value_in_the_last_piece_of_eight_bits():
    tensor = torch.ones(5_000_000)
    tensor[-1] = math.nan
    check_finite({"w": tensor[:-1].to(torch.float8_e4m3fn)}, "file")
    assert "NaN in w" in error_of(check_finite, {"w": tensor.to(torch.float8_e4m3fn)}, "file")


def test_what_has_no_values_to_check():
    nothing = {
        "empty": torch.ones(0, 4),
        "whole": torch.ones(2, dtype=torch.int64),
        "meta": torch.ones(2, device="meta"),
    }
    check_finite({**nothing, "yes": torch.tensor([True])}, "file")
    assert "whole as int64" in error_of(check_floating, {"whole": nothing["whole"]}, "file")


@pytest.mark.parametrize(
    ("value", "source", "target", "advice"),
    [
        (65520.0, torch.float32, torch.float16, "bf16 or fp32"),
        (-1e5, torch.bfloat16, torch.float16, "bf16 or fp32"),
        (3.4e38, torch.float32, torch.bfloat16, "in fp32"),
        (1e39, torch.float64, torch.float32, "in fp32"),
    ],
)
def test_a_precision_that_cannot_hold_a_weight(value, source, target, advice):
    message = error_of(converted, torch.tensor([1.0, value], dtype=source), target, "unet of mine: conv_in.weight")
    assert "unet of mine: conv_in.weight has weights of up to" in message
    assert advice in message
    assert "--precision" in message


def test_a_precision_that_can():
    for source, target in (
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        tensor = torch.tensor([65504.0, -1.0]).to(source if source != torch.bfloat16 else torch.float32)
        assert torch.equal(converted(tensor, target, "x"), tensor.to(target))
    assert converted(torch.ones(2, device="meta"), torch.float16, "x").dtype == torch.float16


def spoil(copy, file, name: str, value: float = math.nan) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    copy.save(file, lambda path: save_file(tensors, path))


def test_each_file_of_a_base_is_refused_when_it_is_opened(copy):
    vae = copy.vae / "diffusion_pytorch_model.safetensors"
    spoil(copy, vae, "decoder.up_blocks.2.resnets.0.conv1.weight")
    said = f"{vae} has NaN in decoder.up_blocks.2.resnets.0.conv1.weight"
    assert said in error_of(read_vae, copy.vae, ROLES)
    assert said in error_of(read_vae, vae, ROLES)
    text = copy.base / "text_encoder/model.safetensors"
    bias = next(name for name in load_file(text) if name.endswith("final_layer_norm.bias"))
    spoil(copy, text, bias)
    assert f"{text} has NaN in {bias}" in error_of(read_base, copy.base, None, frozenset({TEXT_ENCODER}))
    unet = copy.base / "unet/diffusion_pytorch_model.safetensors"
    spoil(copy, unet, "conv_in.weight", math.inf)
    assert f"{unet} has infinity in conv_in.weight" in error_of(read_base, copy.base, None, frozenset({UNET}))


def test_a_file_that_changes_after_it_was_opened(copy):
    unet = read_base(copy.base, None, frozenset({UNET})).unet
    spoil(copy, copy.base / "unet/diffusion_pytorch_model.safetensors", "conv_in.weight")
    assert "has NaN in conv_in.weight" in error_of(unet.load)


def test_language_model_and_vision_encoder(copy):
    shard = next(f for f in sorted(copy.llava.glob("*.safetensors")) if "model.norm.weight" in load_file(f))
    spoil(copy, shard, "model.norm.weight")
    assert f"{shard} has NaN in model.norm.weight" in error_of(read_language, copy.llava)
    file = copy.clip / "model.safetensors"
    spoil(copy, file, "vision_model.pre_layrnorm.weight")
    assert f"{file} has NaN in vision_model.pre_layrnorm.weight" in error_of(read_vision, copy.clip)


@pytest.mark.parametrize("part", ["projectors", "self_cross_attentions", "llm_mapping"])
def test_adapters_are_refused_when_they_are_opened(copy, part):
    config = json.loads((copy.base / "unet/config.json").read_text())
    data = torch.load(copy.adapters, weights_only=True)
    name = next(iter(data[part]))
    data[part][name].view(-1)[0] = math.nan
    copy.save(copy.adapters, lambda path: torch.save(data, path))
    assert f"{copy.adapters}: {part} has NaN in {name}" in error_of(read_adapters, copy.adapters, config, None)


def test_weights_in_integers(copy):
    file = copy.vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].to(torch.int8)
    copy.save(file, lambda path: save_file(tensors, path))
    assert "decoder.conv_in.weight as int8" in error_of(read_vae, copy.vae, ROLES)
    assert "decoder.conv_in.weight as int8" in error_of(read_vae, file, ROLES)


NAME = "lora_unet_mid_block_attentions_0_proj_in"
GOOD = {f"{NAME}.lora_down.weight": torch.ones(2, 64, 1, 1), f"{NAME}.lora_up.weight": torch.ones(64, 2, 1, 1)}


def lora(folder, **parts):
    path = folder / "my.safetensors"
    save_file({**GOOD, **{f"{NAME}.{part}": tensor for part, tensor in parts.items()}}, path)
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_loras_are_refused_when_they_are_opened(tmp_path, base, part, value):
    tensor = GOOD.get(f"{NAME}.{part}", torch.ones(())).clone()
    tensor.view(-1)[0] = value
    path = lora(tmp_path, **{part: tensor})
    assert f"{path} has {'NaN' if math.isnan(value) else 'infinity'} in {NAME}.{part}" in error_of(
        fuse_loras, *base, [LoraFile(path)]
    )


def test_a_lora_whose_sum_leaves_the_range(tmp_path, base):
    path = lora(tmp_path, alpha=torch.tensor(4e38, dtype=torch.float64))
    assert "too large" in error_of(fuse_loras, *base, [LoraFile(path, 1e3)])
    path = lora(tmp_path, alpha=torch.tensor(8.0))
    fused, _ = fuse_loras(*base, [LoraFile(path, 8e37)])
    assert "takes mid_block.attentions.0.proj_in.weight beyond the range of float32" in error_of(fused.load)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1e-5, "small", True])
def test_numbers_in_configs(copy, value):
    cases = [
        (lambda: check_unet({**SD15.unet, "norm_eps": value}, "here"), "norm_eps"),
        (lambda: check_vae({**SD15.vae, "scaling_factor": value}, "here"), "scaling_factor"),
        (lambda: check_text_encoder({**SD15.text_encoder, "layer_norm_eps": value}, "here", 768), "layer_norm_eps"),
        (lambda: read_vision_config(copy.clip), "layer_norm_eps"),
        (lambda: read_language_config(copy.llava), "rms_norm_eps"),
    ]
    config = json.loads((copy.clip / "config.json").read_text())
    copy.edit_json(copy.clip / "config.json", vision_config={**config["vision_config"], "layer_norm_eps": value})
    copy.edit_json(copy.llava / "config.json", rms_norm_eps=value)
    for read, key in cases:
        assert f"has {key} {value!r}" in error_of(read)


@pytest.mark.parametrize("changes", [{"shift_factor": 0.1}, {"latents_mean": [0.0] * 4}, {"use_quant_conv": False}])
def test_vaes_that_scale_latents_otherwise(changes):
    assert next(iter(changes)) in error_of(check_vae, {**SD15.vae, **changes}, "here")
