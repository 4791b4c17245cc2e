"""The table of named bases."""

import re
from pathlib import Path

import pytest

from export.bases import Base, bases
from moma_rt.errors import CheckpointError

NAMES = ["realistic_vision_v4", "rev_animated", "anything_v4", "esthetic_retro_anime", "sd15"]
WEIGHTS = frozenset({"unet", "vae", "text_encoder"})


def test_the_table():
    found = bases()
    assert list(found) == NAMES
    for name, base in found.items():
        assert base.name == name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", base.repository)
        assert base.licence
        assert base.civitai is None or base.civitai.startswith("https://civitai.com/models/")
    assert found["realistic_vision_v4"].vae == "stabilityai/sd-vae-ft-mse"


def test_files_follow_from_the_roles_and_the_format():
    safetensors, other_vae = bases()["anything_v4"], bases()["realistic_vision_v4"]
    only = safetensors.files(frozenset({"unet"}))
    assert "unet/diffusion_pytorch_model.safetensors" in only
    assert "vae/config.json" in only
    assert not any(name.startswith("tokenizer/") or "text_encoder/model" in name for name in only)
    everything = safetensors.files(WEIGHTS)
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} < set(everything)
    assert "tokenizer/merges.txt" in everything
    assert "text_encoder/pytorch_model.bin" in bases()["rev_animated"].files(WEIGHTS)
    assert not any(name.startswith("vae/") for name in other_vae.files(WEIGHTS))


def test_an_unknown_format_is_refused():
    with pytest.raises(CheckpointError, match="known are safetensors, bin"):
        Base("x", "X", "a/b", "onnx", "none")


@pytest.mark.parametrize("text", ["[", "x = 1", "[x]\nrepository = 'a/b'"])
def test_a_damaged_table(monkeypatch, tmp_path, text):
    table = Path(tmp_path / "bases.toml")
    table.write_text(text)
    monkeypatch.setattr("export.bases._TABLE", table)
    with pytest.raises(CheckpointError, match="not a table of bases"):
        bases()
