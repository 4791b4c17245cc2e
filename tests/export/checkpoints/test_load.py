import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints import NETWORK_ROLES, ROLES, CheckpointRequest, load_checkpoint, roles_for
from export.checkpoints.presets import SD15
from export.checkpoints.synthetic import random_component
from moma_rt.errors import CheckpointError


def files(hub, **changes):
    given = {"adapters": hub.adapters, "mllm": hub.llava, "vision": hub.clip, "vae": hub.vae}
    return CheckpointRequest(**{"base": str(hub.base), **given, **changes})


def error_of(request) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(request)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_from_files(original):
    checkpoint = load_checkpoint(files(original))
    assert [c.role for c in checkpoint.components] == list(ROLES)
    assert checkpoint.base == "Realistic_Vision_V4.0_noVAE"
    assert checkpoint.image_size == 512
    assert checkpoint.text_tokenizer == original.base / "tokenizer"
    assert checkpoint.language_tokenizer == original.llava
    assert checkpoint.vae.name == "sd-vae-ft-mse"
    assert checkpoint.vision.name == "clip-vit-large-patch14-336"
    assert len({c.sha256 for c in checkpoint.components}) == 6
    again = load_checkpoint(files(original))
    assert checkpoint == again


def test_content_decides_the_hash(copy, original):
    before = load_checkpoint(files(original))
    assert load_checkpoint(files(copy)) == load_checkpoint(files(copy))
    assert [c.sha256 for c in load_checkpoint(files(copy)).components] == [c.sha256 for c in before.components]
    copy.edit_json(copy.vae / "config.json", force_upcast=False)
    after = load_checkpoint(files(copy))
    assert after.vae.sha256 != before.vae.sha256
    assert after.unet.sha256 == before.unet.sha256


def test_vision_encoder_inside_the_language_model_or_in_its_own_folder(copy):
    beside = load_checkpoint(files(copy))
    copy.edit_json(copy.llava / "config.json", vision_config=beside.vision.config)
    inside = load_checkpoint(files(copy, vision=None))
    assert inside.vision.sha256 == inside.language.sha256
    found, source = inside.vision.load(), load_file(copy.clip / "model.safetensors")
    assert len(found) == len(source)
    assert inside.vision.config == beside.vision.config


def test_tiny_needs_nothing():
    checkpoint = load_checkpoint(CheckpointRequest("tiny"))
    assert (checkpoint.base, checkpoint.image_size) == ("tiny", 256)
    assert (checkpoint.text_tokenizer, checkpoint.language_tokenizer) == (None, None)
    assert [c.role for c in checkpoint.components] == list(ROLES)
    assert all(c.name == "random weights, seed 0" for c in checkpoint.components)
    assert checkpoint == load_checkpoint(CheckpointRequest("tiny", weights="random"))
    assert checkpoint != load_checkpoint(CheckpointRequest("tiny", seed=1))
    assert checkpoint.adapters.config["language_width"] == checkpoint.language.config["hidden_size"]


def test_the_small_model_with_random_weights():
    checkpoint = load_checkpoint(CheckpointRequest("mini", weights="random"))
    assert (checkpoint.base, checkpoint.image_size) == ("mini", 128)
    assert (checkpoint.text_tokenizer, checkpoint.language_tokenizer) == (None, None)
    assert [c.role for c in checkpoint.components] == list(ROLES)
    assert all(c.name == "random weights, seed 0" for c in checkpoint.components)
    assert checkpoint.adapters.config["mapping_width"] == 128
    assert checkpoint != load_checkpoint(CheckpointRequest("mini", weights="random", seed=1))


def test_where_the_small_models_weights_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("export.checkpoints.load._MINI_WEIGHTS", tmp_path)
    message = error_of(CheckpointRequest("mini"))
    assert message.startswith(f"{tmp_path} does not hold the small model")
    assert "train it with python -m examples.mini_moma (docs/mini.md), or give --weights random" in message
    assert error_of(CheckpointRequest("mini", weights=f"{tmp_path}/x")).startswith(f"{tmp_path}/x does not exist")
    named_so = tmp_path / "mini"
    named_so.mkdir()
    assert "is not a diffusers folder" in error_of(CheckpointRequest(str(named_so)))


def test_bases_share_all_but_unet_and_text_encoder():
    first, second = (load_checkpoint(CheckpointRequest(name, weights="random")) for name in ("sd15", "rev_animated"))
    changed = {c.role for c, other in zip(first.components, second.components, strict=True) if c.sha256 != other.sha256}
    assert changed == {"unet", "text_encoder"}
    assert (first.base, second.base) == ("sd15", "rev_animated")
    assert second.text_encoder.name == "random weights, seed 0 of rev_animated"
    configs = [component.config for component in first.components]
    assert configs == [component.config for component in second.components]
    again = load_checkpoint(CheckpointRequest("rev_animated", weights="random", seed=1))
    assert all(c.sha256 != other.sha256 for c, other in zip(second.components, again.components, strict=True))
    adapters, other = first.adapters.load(), second.adapters.load()
    assert all(torch.equal(adapters[name], other[name]) for name in adapters)


def test_sd15_random_is_made_when_loaded():
    checkpoint = load_checkpoint(CheckpointRequest("sd15", weights="random"))
    assert (checkpoint.base, checkpoint.image_size) == ("sd15", 512)
    assert checkpoint.unet.config["block_out_channels"] == (320, 640, 1280, 1280)
    assert checkpoint.language.config["hidden_size"] == 4096
    assert checkpoint.adapters.config == {
        "context_tokens": 4,
        "context_width": 768,
        "embedding_width": 1024,
        "language_width": 4096,
        "mapping_width": 1024,
    }


def test_random_beside_files(original):
    given = {"base": str(original.base), "weights": "random", "mllm": original.llava}
    checkpoint = load_checkpoint(CheckpointRequest(**given, vision=original.clip))
    assert checkpoint.adapters.config["language_width"] == 128
    assert checkpoint.adapters.config["context_width"] == 768
    only = load_checkpoint(CheckpointRequest(**given, roles=frozenset({"adapters"})))
    assert only.adapters.sha256 == checkpoint.adapters.sha256
    checkpoint = load_checkpoint(CheckpointRequest(str(original.base), weights="random", vision=original.clip))
    assert checkpoint.language.config["mm_hidden_size"] == 64
    checkpoint = load_checkpoint(CheckpointRequest("tiny", vae=original.vae))
    assert checkpoint.vae.name == "sd-vae-ft-mse"
    folder = load_checkpoint(files(original, base="sd15", weights=str(original.base)))
    assert folder.base == "sd15"
    assert folder.unet.sha256 == load_checkpoint(files(original)).unet.sha256


@pytest.mark.parametrize(
    ("network", "changes", "flag"),
    [
        ("denoiser", {"adapters": None}, "--adapters"),
        ("subject_encoder", {"adapters": None}, "--adapters"),
        ("context_projector", {"adapters": None}, "--adapters"),
        ("language_model", {"adapters": None}, "--adapters"),
        ("language_model", {"mllm": None}, "--mllm"),
        ("vision_encoder", {"mllm": None}, "--mllm"),
    ],
)
def test_what_a_network_needs(original, network, changes, flag):
    assert flag in error_of(files(original, roles=roles_for([network]), **changes))


def test_unneeded_roles_may_be_absent(original):
    nothing = {"adapters": None, "mllm": None, "vision": None, "vae": None}
    for network in ("text_encoder", "vae_encoder", "vae_decoder"):
        checkpoint = load_checkpoint(files(original, roles=roles_for([network]), **nothing))
        assert {c.role for c in checkpoint.components} == NETWORK_ROLES[network]
    checkpoint = load_checkpoint(files(original, roles=roles_for(["denoiser"]), mllm=None, vision=None))
    assert (checkpoint.language, checkpoint.vision, checkpoint.language_tokenizer) == (None, None, None)
    assert [c.role for c in checkpoint.components] == ["unet", "adapters"]


def test_a_missing_vision_encoder(copy):
    tensors = {n: t for f in sorted(copy.llava.glob("*.safetensors")) for n, t in load_file(f).items()}
    for file in (*copy.llava.glob("*.safetensors"), copy.llava / "model.safetensors.index.json"):
        file.unlink()
    save_file({n: t for n, t in tensors.items() if "vision_tower" not in n}, copy.llava / "model.safetensors")
    assert "--vision" in error_of(files(copy, vision=None))


def test_parts_that_do_not_fit_each_other(copy):
    wrong = {**load_checkpoint(files(copy)).vision.config, "hidden_size": 128}
    message = error_of(CheckpointRequest("tiny", adapters=copy.adapters))
    assert "does not fit" in message
    assert "[32, 32, 64, 64]" in message
    assert "width 128, the one given has 4096" in error_of(
        CheckpointRequest(str(copy.base), weights="random", adapters=copy.adapters)
    )
    shutil.rmtree(copy.clip)
    copy.clip.mkdir()
    (copy.clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": wrong}))
    save_file(random_component("vision", wrong, 0).load(), copy.clip / "model.safetensors")
    assert "width 128, the language model's projection takes 64" in error_of(files(copy))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (CheckpointRequest("sd15", weights="/nowhere"), "/nowhere does not exist; --weights takes random"),
        (CheckpointRequest("/nowhere"), "/nowhere does not exist; a base is tiny, mini, realistic_vision_v4"),
        (CheckpointRequest("rev_animate"), "rev_animated"),
        (CheckpointRequest("tiny", weights="/x"), "takes no --weights"),
        (CheckpointRequest("/x", weights="/y"), "goes with a base's name (realistic_vision_v4"),
        (CheckpointRequest("tiny", roles=frozenset({"unets"})), "unknown roles unets"),
    ],
)
def test_requests_that_cannot_be_met(request_, said):
    assert said in error_of(request_)


def test_roles_for():
    assert roles_for(["vae_encoder", "denoiser"]) == {"vae", "unet", "adapters"}
    assert roles_for([]) == frozenset()
    assert roles_for(NETWORK_ROLES) == set(ROLES)
    assert SD15.mapping_width == 1024
