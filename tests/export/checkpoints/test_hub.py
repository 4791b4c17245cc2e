"""Downloads, with a fake in place of the hub's library: no test here reaches the network."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from export.bases import bases
from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.hub import download_base
from moma_rt.errors import CheckpointError

WEIGHTS = frozenset({"unet", "vae", "text_encoder"})


class FakeHub:
    """Replaces the hub's library: folders by repository, and a list of the requested downloads."""

    def __init__(self, folders):
        self.folders, self.asked = folders, []

    def snapshot_download(self, repository, allow_patterns):
        self.asked.append((repository, tuple(allow_patterns)))
        return str(self.folders[repository])


@pytest.fixture
def fake_hub(monkeypatch, original):
    hub = FakeHub({"SG161222/Realistic_Vision_V4.0_noVAE": original.base, "stabilityai/sd-vae-ft-mse": original.vae})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_name_alone_downloads(fake_hub, original):
    given = {"adapters": original.adapters, "mllm": original.llava, "vision": original.clip}
    found = load_checkpoint(CheckpointRequest("realistic_vision_v4", **given))
    by_hand = load_checkpoint(CheckpointRequest(str(original.base), vae=original.vae, **given))
    assert found.base == "realistic_vision_v4"
    assert found.components == by_hand.components
    base = bases()["realistic_vision_v4"]
    vae = ("config.json", "diffusion_pytorch_model.safetensors")
    assert fake_hub.asked == [(base.repository, base.files(frozenset(found.roles))), (base.vae, vae)]


def test_a_given_vae_is_not_downloaded(fake_hub, original, tmp_path):
    base = bases()["realistic_vision_v4"]
    assert download_base(base, WEIGHTS, tmp_path) == (original.base, tmp_path)
    assert download_base(base, frozenset({"unet"}), None) == (original.base, None)
    assert len(fake_hub.asked) == 2


def test_a_repository_without_a_file(fake_hub, tmp_path):
    fake_hub.folders["SG161222/Realistic_Vision_V4.0_noVAE"] = tmp_path
    with pytest.raises(CheckpointError, match="lacks model_index.json, "):
        load_checkpoint(CheckpointRequest("realistic_vision_v4"))


@pytest.mark.parametrize("name", bases())
@pytest.mark.parametrize("failure", [OSError("no route\nto host"), ValueError("x")])
def test_without_a_network(monkeypatch, name, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(CheckpointRequest(name))
    message, base = str(caught.value), bases()[name]
    assert "\n" not in message
    assert "to host" not in message
    assert f"https://huggingface.co/{base.repository} into a folder and give it with --weights" in message
    assert all(file in message for file in base.files(WEIGHTS))
    assert (base.civitai or "") in message
    assert (base.vae or "") in message


def test_the_library_itself_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="sd15 is not here and could not be downloaded"):
        load_checkpoint(CheckpointRequest("sd15"))
