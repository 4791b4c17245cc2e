"""Names of LoRAs' layers, and hints for files that are something else."""

import pytest
import torch

from export.checkpoints.lora import LoraFile, fuse_loras
from moma_rt.errors import CheckpointError
from tests.export.checkpoints.lora_files import written

DOWN, UP = torch.arange(128.0).reshape(2, 64) / 128, torch.arange(128.0).reshape(64, 2) / 64
LAYER = "encoder.layers.1.self_attn.out_proj"
FLAT = LAYER.replace(".", "_")


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (f"text_encoder.{LAYER}", "lora_A", "lora_B"),
        (f"text_encoder.text_model.{LAYER}", "lora_linear_layer.down", "lora_linear_layer.up"),
        (f"text_encoder.{LAYER}", "lora.down", "lora.up"),
        (f"text_encoder.text_model.{LAYER}", "lora_A.default_0", "lora_B.default_0"),
        (f"text_model.{LAYER}", "lora_A", "lora_B"),
        (f"lora_te_text_model_{FLAT}", "lora_down", "lora_up"),
        (f"lora_te_{FLAT}", "lora_down", "lora_up"),
    ],
)
def test_spellings_of_a_layer_of_the_text_encoder(tmp_path, base, states, layer, down, up):
    path = written(tmp_path, {f"{layer}.{down}.weight": DOWN, f"{layer}.{up}.weight": UP})
    found = fuse_loras(*base, [LoraFile(path)])[1].load()
    weight = next(name for name in states[1] if name.endswith(f"{LAYER}.weight"))
    torch.testing.assert_close(found[weight], states[1][weight] + UP @ DOWN)
    assert all(torch.equal(found[name], states[1][name]) for name in found if name != weight)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "as SDXL's LoRAs have"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight", "as SDXL's LoRAs have"),
        ("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", "of other architectures"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "of other architectures"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "of a LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "of a LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "of a DoRA"),
        ("model.diffusion_model.out.0.bias", "--base takes those"),
        ("emb_params", "of embeddings"),
    ],
)
def test_other_files_are_described_not_judged(tmp_path, base, name, hint):
    path = written(tmp_path, {name: UP})
    with pytest.raises(CheckpointError) as caught:
        fuse_loras(*base, [LoraFile(path)])
    message = str(caught.value)
    assert f"{path} cannot be fused: it has {name} (" in message
    assert hint in message
    assert "looked for layers of this base's UNet and text encoder named lora_unet_*" in message
