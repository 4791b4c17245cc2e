"""The built-in geometries: `sd15`, the real one; `mini`, of the small trained model; `tiny`, of the fastest tests."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Frozen = MappingProxyType[str, Any]


@dataclass(frozen=True)
class Preset:
    """Configs of the five networks and the mapping's inner width."""

    unet: Frozen
    vae: Frozen
    text_encoder: Frozen
    language: Frozen
    vision: Frozen
    mapping_width: int


_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "center_input_sample": False,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "out_channels": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "out_channels": 3,
    "scaling_factor": 0.18215,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
}
_LANGUAGE = {
    "architectures": ("LlavaLlamaForCausalLM",),
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava_llama",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
}
_VISION = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_channels": 3,
    "patch_size": 14,
}


def _with(common: dict[str, Any], **own: Any) -> Frozen:
    return MappingProxyType({**common, **own})


SD15 = Preset(
    unet=_with(
        _UNET, sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, norm_num_groups=32
    ),
    vae=_with(_VAE, sample_size=256, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32),
    text_encoder=_with(
        _TEXT, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, vocab_size=49408
    ),
    language=_with(
        _LANGUAGE,
        hidden_size=4096,
        intermediate_size=11008,
        mm_hidden_size=1024,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        torch_dtype="float16",
        vocab_size=32000,
    ),
    vision=_with(
        _VISION, hidden_size=1024, intermediate_size=4096, image_size=336, num_attention_heads=16, num_hidden_layers=24
    ),
    mapping_width=1024,
)

TINY = Preset(
    # Head widths of 16 and 32: the smallest that TensorRT's fused attention takes.
    unet=_with(
        _UNET,
        sample_size=32,
        block_out_channels=(32, 32, 64, 64),
        attention_head_dim=2,
        cross_attention_dim=64,
        norm_num_groups=8,
    ),
    vae=_with(_VAE, sample_size=256, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8),
    text_encoder=_with(
        _TEXT, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2, vocab_size=1024
    ),
    language=_with(
        _LANGUAGE,
        hidden_size=64,
        intermediate_size=128,
        mm_hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=4,
        vocab_size=1024,
    ),
    vision=_with(
        _VISION, hidden_size=64, intermediate_size=128, image_size=112, num_attention_heads=4, num_hidden_layers=3
    ),
    mapping_width=128,
)

MINI = Preset(
    unet=_with(
        _UNET,
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=2,
        cross_attention_dim=128,
        norm_num_groups=4,
    ),
    vae=_with(_VAE, sample_size=128, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=2),
    # The numbers of tokens are those of random weights: trained ones come with the sizes of their own tokenizers.
    text_encoder=_with(
        _TEXT, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2, vocab_size=1216
    ),
    language=_with(
        _LANGUAGE,
        hidden_size=64,
        intermediate_size=128,
        mm_hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=704,
    ),
    vision=_with(
        _VISION, hidden_size=64, intermediate_size=128, image_size=112, num_attention_heads=2, num_hidden_layers=3
    ),
    mapping_width=128,
)
