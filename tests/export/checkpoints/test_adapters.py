import json
import os

import pytest
import torch

from export.checkpoints.adapters import read_adapters
from moma_rt.errors import CheckpointError


@pytest.fixture
def unet_config(original):
    return json.loads((original.base / "unet/config.json").read_text())


def raw(copy):
    return torch.load(copy.adapters, weights_only=True)


def error_of(*args) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapters(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_go_to_their_layers(copy, goldens, unet_config):
    index = json.loads((goldens / "attn_processor_index_tiny.json").read_text())
    component = read_adapters(copy.adapters, unet_config, 128)
    found, stored = component.load(), raw(copy)
    expected = {f"projectors.{name}": tensor for name, tensor in stored["projectors"].items()}
    expected |= stored["llm_mapping"]
    for name, tensor in stored["self_cross_attentions"].items():
        number, rest = name.split(".", 1)
        expected[f"attention.{index[number].removesuffix('.processor')}.{rest}"] = tensor
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert "attention.mid_block.attentions.0.transformer_blocks.0.attn1.scale_learnable" in found
    assert component.config == {
        "context_tokens": 4,
        "context_width": 768,
        "embedding_width": 1024,
        "language_width": 128,
        "mapping_width": 1024,
    }
    assert component.name == "attn_adapters_projectors.th"


def test_folder_and_scalar_scales(copy, unet_config):
    data = raw(copy)
    data["self_cross_attentions"]["0.scale_learnable"] = torch.tensor(0.75)
    copy.save(copy.adapters, lambda path: torch.save(data, path))
    found = read_adapters(copy.adapters.parent, unet_config, None).load()
    scale = found["attention.down_blocks.0.attentions.0.transformer_blocks.0.attn1.scale_learnable"]
    assert torch.equal(scale, torch.tensor([0.75]))


def parts_under(start: str):
    return lambda data: {part: {f"{start}{name}": t for name, t in data[part].items()} for part in data}


WAYS = {
    "wrapped": lambda data: {"state_dict": data, "optimizer": {"lr": 1e-4}},
    "wrapped twice": lambda data: {"model": {"state_dict": data}},
    "data parallel": parts_under("module."),
    "beside other entries": lambda data: {**data, "epoch": 7, "name": "mine", "best": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_as_trainers_save_them(copy, unet_config, way):
    expected, data = read_adapters(copy.adapters, unet_config, 128).load(), WAYS[way](raw(copy))
    copy.save(copy.adapters, lambda path: torch.save(data, path))
    found = read_adapters(copy.adapters, unet_config, 128).load()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def change_part(part, name, tensor):
    def change(data):
        data[part][name] = tensor

    return change


def rename(part, old, new):
    def change(data):
        data[part][new] = data[part].pop(old)

    return change


SELF = "self_cross_attentions"
FAULTS = [
    (lambda data: data.pop("llm_mapping"), "expected projectors, self_cross_attentions, llm_mapping"),
    (lambda data: data.update(extra={}), "extra"),
    (rename(SELF, "5.to_k_ip.weight", "module.5.to_k_ip.weight"), f"unexpected {SELF} module.5.to_k_ip.weight"),
    (rename(SELF, "5.to_k_ip.weight", "32.to_k_ip.weight"), f"unexpected {SELF} 32.to_k_ip.weight"),
    (lambda data: data[SELF].pop("30.to_v_ip.weight"), "missing attention.mid_block"),
    (change_part(SELF, "1.scale_learnable", torch.ones(1)), "unexpected attention.down_blocks.0"),
    (change_part(SELF, "2.scale_learnable", torch.ones(2)), "is [2] instead of [1]"),
    (change_part(SELF, "0.to_k_ip.weight", torch.ones(320, 320)), "is [320, 320] instead of [16, 16]"),
    (change_part("projectors", "proj.weight", torch.ones(1024, 1024)), "[1024, 1024] instead of [3072, 1024]"),
    (rename("projectors", "proj.weight", "weight"), "missing proj.weight"),
    (rename("llm_mapping", "mapping.up_proj.weight", "up_proj.weight"), "unexpected llm_mapping up_proj.weight"),
    (change_part("llm_mapping", "mapping.down_proj.weight", torch.ones(1024, 7)), "mapping.down_proj.weight is"),
    (change_part("llm_mapping", "mapping.gate_proj.weight", torch.ones(7)), "not matrices"),
    (change_part("projectors", "proj.bias", 3), "flat state dict"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS, ids=[said[:40] for _, said in FAULTS])
def test_keys_and_shapes_are_strict(copy, unet_config, change, said):
    data = raw(copy)
    change(data)
    copy.save(copy.adapters, lambda path: torch.save(data, path))
    assert said in error_of(copy.adapters, unet_config, None)


def test_other_geometries(original, unet_config):
    wide = {**unet_config, "block_out_channels": [320, 640, 1280, 1280]}
    message = error_of(original.adapters, wide, None)
    assert "is [16, 16] instead of [320, 320]" in message
    assert "[320, 640, 1280, 1280]" in message
    shallow = {**unet_config, "layers_per_block": 1}
    assert "a UNet of 20 attentions" in error_of(original.adapters, shallow, None)
    assert "width 128, the one given has 4096" in error_of(original.adapters, unet_config, 4096)
    assert "text width 64" in error_of(original.adapters, {**unet_config, "cross_attention_dim": 64}, None)


def test_missing_truncated_and_foreign_files(copy, unet_config, tmp_path):
    assert "--adapters" in error_of(tmp_path / "none.th", unet_config, None)
    assert "--adapters" in error_of(tmp_path, unet_config, None)
    copy.truncate(copy.adapters)
    assert "truncated" in error_of(copy.adapters, unet_config, None)
    copy.save(copy.adapters, lambda path: torch.save([1], path))
    assert "holds a list" in error_of(copy.adapters, unet_config, None)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_malicious_file_is_not_run(copy, unet_config, tmp_path):
    data = {**raw(copy), "llm_mapping": Attack(tmp_path / "ran")}
    copy.save(copy.adapters, lambda path: torch.save(data, path))
    message = error_of(copy.adapters, unet_config, None)
    assert "contains code" in message
    assert "refused" in message
    assert not (tmp_path / "ran").exists()
