import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.mini_moma import vae as stage
from examples.mini_moma.groups import chunk_folders, read_chunk
from examples.mini_moma.vae import VaeTask, fold_statistics, latents_file, load_vae, make_vae, to_network
from export.checkpoints.architectures import SCALING_FACTOR
from moma_rt.errors import InputError
from tests.examples.mini_moma.conftest import GROUPS, NoPool


@pytest.fixture(scope="module")
def weights():
    """Of a VAE whose latents have other statistics in every channel."""
    torch.manual_seed(0)
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([0.5, 2, 3, 4]).view(-1, 1, 1, 1)
        vae.quant_conv.bias[:4] += torch.tensor([1.0, -2, 0, 3])
    return vae.state_dict()


@pytest.fixture
def vae(weights):
    vae = make_vae()
    vae.load_state_dict(weights)
    return vae.eval()


def pictures(count=12, side=32):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, side // 8, side // 8, 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


@torch.no_grad()
def test_folding_scales_latents_and_leaves_the_pictures(vae):
    given = to_network(pictures())
    before = vae.encode(given).latent_dist
    decoded = vae.decode(before.mean).sample
    fold_statistics(vae, pictures())
    after = vae.encode(given).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    scaled = after.mean * SCALING_FACTOR
    assert not torch.allclose(before.mean.std((0, 2, 3)) * SCALING_FACTOR, torch.ones(4), atol=0.1)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # The noise of sampling is scaled like the means.
    factor = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    torch.testing.assert_close(after.std, before.std * factor.view(-1, 1, 1), atol=0, rtol=1e-3)


def test_pictures_become_minus_one_to_one():
    network = to_network(np.array([[[[0, 255, 51]]]], np.uint8))
    assert network.flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert network.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(("progress", "shape"), [(0.5, (4, 3, 64, 64)), (0.9, (1, 3, 128, 128))])
def test_crops_are_learned_first_and_whole_pictures_last(drawn_data, progress, shape):
    torch.manual_seed(0)
    task, seen = VaeTask(drawn_data), []
    encode = task.module.encode
    task.module.encode = lambda given: (seen.append(given), encode(given))[1]
    loss, shown = task.loss(np.random.default_rng(0), progress)
    loss.backward()
    assert [tuple(given.shape) for given in seen] == [shape]
    assert list(shown) == ["l1", "mse", "kl"]
    assert loss.item() > shown["l1"] > 0
    assert [name for name, p in task.module.named_parameters() if p.grad is None] == []
    assert task.uses_muon("", task.module.encoder.conv_in.weight)


@pytest.fixture
def trained(monkeypatch, weights):
    """The trainings that were asked for; each gives the same weights at once."""
    plans = []
    monkeypatch.setattr(stage, "train", lambda make_task, plan: (plans.append(plan), weights)[1])
    monkeypatch.setattr(stage, "ProcessPoolExecutor", NoPool)
    threads = torch.get_num_threads()
    yield plans
    torch.set_num_threads(threads)


def options(data):
    return argparse.Namespace(data=data, steps=5, processes=2, minutes=None)


def test_the_stage_writes_the_vae_and_all_latents(data, trained, capsys):
    stale = latents_file(chunk_folders(data, "train")[0])
    save_file({"photos_nschw": torch.zeros(1)}, stale)
    stage.run(options(data))
    assert [(plan.name, plan.steps, plan.folder) for plan in trained] == [("vae", 5, data)]
    assert "dB" in capsys.readouterr().out
    vae = load_vae(data)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    for split in ("train", "heldout"):
        (folder,) = chunk_folders(data, split)
        latents, chunk = load_file(latents_file(folder)), read_chunk(folder)
        assert latents["photos_nschw"].shape == (GROUPS, 2, 4, 16, 16)
        assert latents["targets_nkschw"].shape == (GROUPS, 4, 2, 4, 16, 16)
        assert latents["photos_nschw"].dtype == torch.float16
        posterior = vae.encode(to_network(chunk.targets_nkhwc[1, 2:3])).latent_dist
        expected = torch.stack([posterior.mean, posterior.std], 1) * SCALING_FACTOR
        torch.testing.assert_close(latents["targets_nkschw"][1, 2:3].float(), expected, atol=2e-3, rtol=2e-3)
    # A second run finds all done.
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    stage.run(options(data))
    assert len(trained) == 1
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_data_stage_was_not_finished(data, trained, split):
    chunk_folders(data, split)[0].rename(data / "elsewhere")
    with pytest.raises(InputError, match="has no training samples; first run: python -m examples.mini_moma data"):
        stage.run(options(data))
    assert trained == []


def test_no_vae_yet(tmp_path):
    with pytest.raises(
        InputError, match=r"vae.safetensors does not exist; first run: python -m examples.mini_moma vae"
    ):
        load_vae(tmp_path)
