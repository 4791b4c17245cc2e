import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel

from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.presets import SD15, TINY
from export.geometry import geometry_of, self_attention_layers
from moma_rt.bundle.specs import Geometry, LanguageGeometry
from moma_rt.errors import CheckpointError


@pytest.mark.parametrize(("preset", "size"), [(TINY, 32), (SD15, 64)], ids=["tiny", "sd15"])
def test_layers_are_those_of_diffusers(preset, size):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(preset.unet))
        grids, hooks = {}, []
        for name, module in unet.named_modules():
            if name.endswith(".attn1"):
                path = name.split(".transformer_blocks.")[0]
                hook = lambda _, args, path=path: grids.update({path: round(args[0].shape[1] ** 0.5)})  # noqa: E731
                hooks.append(module.register_forward_pre_hook(hook))
        text = torch.zeros(1, 77, preset.unet["cross_attention_dim"])
        unet(torch.zeros(1, 4, size, size), torch.zeros(()), encoder_hidden_states=text)
    layers = self_attention_layers(dict(preset.unet), size)
    selves = [name for name in unet.attn_processors if ".attn1." in name]
    assert [f"{layer.name}.transformer_blocks.0.attn1.processor" for layer in layers] == selves
    for layer in layers:
        attention = unet.get_submodule(f"{layer.name}.transformer_blocks.0.attn1")
        expected = (attention.to_k.out_features, attention.heads, grids[layer.name])
        assert (layer.channels, layer.heads, layer.grid) == expected


def test_heads_per_level_and_configs_that_leave_the_defaults_out():
    per_level = {**SD15.unet, "attention_head_dim": [5, 10, 20, 20]}
    assert [layer.heads for layer in self_attention_layers(per_level, 64)][::3] == [5, 10, 20, 10, 5, 20]
    sparse = {"block_out_channels": SD15.unet["block_out_channels"]}
    assert self_attention_layers(sparse, 64) == self_attention_layers(dict(SD15.unet), 64)


def test_tiny(tiny_geometry):
    sizes = dataclasses.replace(tiny_geometry, self_attention=())
    language = LanguageGeometry(1024, 64, 2, 4, 16, 112, 64)
    assert sizes == Geometry(256, 4, 32, 77, 64, 4, 1024, (), language)
    assert tiny_geometry.grids == (32, 16, 8, 4)


def test_sd15():
    geometry = geometry_of(load_checkpoint(CheckpointRequest("sd15", weights="random")))
    language = LanguageGeometry(32000, 4096, 32, 32, 128, 336, 576)
    assert dataclasses.replace(geometry, self_attention=()) == Geometry(512, 4, 64, 77, 768, 4, 1024, (), language)
    assert geometry.grids == (64, 32, 16, 8)
    assert [(layer.grid, layer.channels) for layer in geometry.self_attention] == [
        *((64, 320), (64, 320), (32, 640), (32, 640), (16, 1280), (16, 1280)),
        *((16, 1280),) * 3,
        *((32, 640),) * 3,
        *((64, 320),) * 3,
        (8, 1280),
    ]


def test_a_base_alone_has_no_language_geometry(tiny_checkpoint):
    for missing in ("language", "vision"):
        assert geometry_of(dataclasses.replace(tiny_checkpoint, **{missing: None})).language is None


def test_fewer_key_heads_than_query_heads(tiny_checkpoint):
    config = {**tiny_checkpoint.language.config, "num_key_value_heads": 2}
    language = dataclasses.replace(tiny_checkpoint.language, config=config)
    geometry = geometry_of(dataclasses.replace(tiny_checkpoint, language=language))
    assert (geometry.language.kv_heads, geometry.language.head_width) == (2, 16)


def test_a_unet_config_without_its_number_of_channels(tiny_checkpoint, tiny_geometry):
    config = {key: value for key, value in tiny_checkpoint.unet.config.items() if key != "in_channels"}
    unet = dataclasses.replace(tiny_checkpoint.unet, config=config)
    assert geometry_of(dataclasses.replace(tiny_checkpoint, unet=unet)) == tiny_geometry


def test_adapters_of_another_embedding_width(tiny_checkpoint):
    config = {**tiny_checkpoint.adapters.config, "embedding_width": 512}
    adapters = dataclasses.replace(tiny_checkpoint.adapters, config=config)
    with pytest.raises(CheckpointError, match="embeddings of width 512; MoMA's have 1024"):
        geometry_of(dataclasses.replace(tiny_checkpoint, adapters=adapters))
