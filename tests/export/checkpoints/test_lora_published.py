"""LoRAs as they are published for few steps, and as the libraries write them after training."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from export.checkpoints.architectures import expected_shapes
from export.checkpoints.lora import LoraFile, fuse_loras
from export.checkpoints.model import TEXT_ENCODER, UNET
from export.checkpoints.presets import SD15, TINY
from export.checkpoints.synthetic import random_component
from moma_rt.errors import CheckpointError
from tests.export.checkpoints.lora_files import fused_by_diffusers, tiny_unet, written

# The layers that diffusers' consistency distillation adapts, and with it LCM-LoRA, TCD and Hyper-SD.
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
ADAPTED += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
PYTORCH = {"__metadata__": {"format": "pt"}}
# dtype, header's metadata, bytes of the file, and where it is known the SHA-256 of its header.
PUBLISHED = {
    "latent-consistency/lcm-lora-sdv1-5": (
        *("F16", PYTORCH, 134621556),
        "3ca15dde66470e73c8d68dbb9ab64d6e7ad014f525b58193a9a3b161eb6cc263",
    ),
    "Hyper-SD15-1step-lora": ("F32", PYTORCH, 269127096, None),
    "Hyper-SD15-2steps-lora, -4steps-, -8steps-, -8steps-CFG-, -12steps-CFG-": ("F32", {}, 269127064, None),
}


def few_step_shapes(unet_config, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a few-step LoRA."""
    found: dict[str, tuple[int, ...]] = {}
    for weight, shape in expected_shapes(UNET, dict(unet_config), "the preset").items():
        layer = weight.removesuffix(".weight")
        if weight != layer and any(f".{layer}".endswith(f".{kind}") for kind in ADAPTED):
            name = f"lora_unet_{layer.replace('.', '_')}"
            up = (shape[0], rank, *(1 for _ in shape[2:]))
            found |= {f"{name}.lora_down.weight": (rank, *shape[1:]), f"{name}.lora_up.weight": up, f"{name}.alpha": ()}
    return found


def empty_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, metadata: dict) -> bytes:
    """Write a sparse safetensors file of zeros, with the header that the library would write; return the header."""
    entries, end = dict(metadata), 0
    for name in sorted(shapes):
        start, end = end, end + torch.Size(shapes[name]).numel() * {"F16": 2, "F32": 4}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as stream:
        stream.truncate(8 + len(header) + end)
    return header


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(tmp_path, name):
    """The published files, byte for byte except for the values: every tensor belongs to a layer of SD1.5's UNet."""
    dtype, metadata, size, sha256 = PUBLISHED[name]
    shapes = few_step_shapes(SD15.unet, 64)
    assert len(shapes) == 3 * 278
    path = tmp_path / "lora.safetensors"
    header = empty_file(path, shapes, dtype, metadata)
    assert path.stat().st_size == size
    assert sha256 in (None, hashlib.sha256(header).hexdigest())
    unet, text = random_component(UNET, SD15.unet, 0), random_component(TEXT_ENCODER, SD15.text_encoder, 0)
    fused, same_text = fuse_loras(unet, text, [LoraFile(path)])
    assert same_text is text
    weight = "mid_block.resnets.1.time_emb_proj.weight"
    assert torch.equal(fused.load([weight])[weight], unet.load([weight])[weight])


def test_a_few_step_lora_equals_diffusers(tmp_path, base, states):
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(0)
    shapes = few_step_shapes(TINY.unet, 4)
    tensors = {n: (torch.randn(s, generator=generator) * 0.2 if s else torch.tensor(8.0)) for n, s in shapes.items()}
    path = written(tmp_path, {name: tensor.half() for name, tensor in tensors.items()}, {"format": "pt"})
    expected, _ = fused_by_diffusers(states, path, 1.0)
    assert_fused(fuse_loras(*base, [LoraFile(path)])[0].load(), expected, states[0], len(shapes) // 3)


def assert_fused(found, expected, before, count: int) -> None:
    assert found.keys() == expected.keys()
    assert sum(not torch.equal(found[name], before[name]) for name in found) == count
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.fixture
def trained(states):
    """diffusers' UNet in PEFT's wrapper, with random LoRA weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "linear_1", "conv_in"],
        alpha_pattern={"attn1.to_q": 7.5},
        rank_pattern={"conv_in": 2},
        use_rslora=True,
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_unet(states[0]), config)


def merged(trained):
    return trained.merge_and_unload().state_dict()


def adapted_layers(trained) -> int:
    return sum(name.endswith("lora_A.default.weight") for name in trained.state_dict())


def test_an_adapter_that_peft_wrote(tmp_path, base, states, trained):
    trained.save_pretrained(tmp_path)
    count = adapted_layers(trained)
    fused, _ = fuse_loras(*base, [LoraFile(tmp_path / "adapter_model.safetensors")])
    assert_fused(fused.load(), merged(trained), states[0], count)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 10}))
    stronger, _ = fuse_loras(*base, [LoraFile(tmp_path / "adapter_model.safetensors")])
    assert stronger.sha256 != fused.sha256
    weight = "conv_in.weight"
    assert not torch.equal(stronger.load([weight])[weight], fused.load([weight])[weight])


def test_an_adapter_that_diffusers_wrote_of_a_peft_model(tmp_path, base, states, trained):
    """As diffusers' consistency distillation scripts save it: with both prefixes, and without the scale."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    trained.save_pretrained(tmp_path)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "unet_lora", get_peft_model_state_dict(trained))
    path = tmp_path / "unet_lora" / "pytorch_lora_weights.safetensors"
    with pytest.raises(CheckpointError, match=r"is in PEFT's layout: put its adapter_config\.json, which holds"):
        fuse_loras(*base, [LoraFile(path)])
    shutil.copy(tmp_path / "adapter_config.json", path.parent)
    count = adapted_layers(trained)
    assert_fused(fuse_loras(*base, [LoraFile(path)])[0].load(), merged(trained), states[0], count)


def test_an_adapter_of_the_unet_alone_that_diffusers_wrote(tmp_path, base, states, trained):
    """`save_lora_adapter` writes no prefix in the names, nor in the header, which holds the scale."""
    count = adapted_layers(trained)
    unet = trained.get_base_model()
    unet.peft_config = trained.peft_config
    unet.save_lora_adapter(tmp_path)
    fused, _ = fuse_loras(*base, [LoraFile(tmp_path / "pytorch_lora_weights.safetensors")])
    assert_fused(fused.load(), merged(trained), states[0], count)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "adapter_config.json is not readable as JSON"),
        ("[]", "adapter_config.json is not a JSON object"),
        ('{"r": 3}', "has a damaged adapter_config.json beside it"),
        (
            '{"lora_alpha": "much"}',
            "adapter_config.json has 'much' as the alpha of lora_alpha; it must be a finite",
        ),
        ('{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', "has a damaged adapter_config.json beside it"),
    ],
)
def test_damaged_configurations_of_peft(tmp_path, base, config, said):
    name = "base_model.model.mid_block.attentions.0.proj_in"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 64, 1, 1), f"{name}.lora_B.weight": torch.ones(64, 2, 1, 1)}
    path = written(tmp_path, factors)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        fuse_loras(*base, [LoraFile(path)])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_adapters_of_peft_are_refused(tmp_path, base, states):
    """DoRA adds tensors of magnitudes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
    peft.get_peft_model(tiny_unet(states[0]), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="adapter_config.json has use_dora: DoRA"):
        fuse_loras(*base, [LoraFile(tmp_path / "adapter_model.safetensors")])
