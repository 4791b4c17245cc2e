import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.mini_moma.batches import Samples
from examples.mini_moma.groups import chunk_folders, read_chunk
from examples.mini_moma.vae import latents_file
from moma_rt.errors import InputError


@pytest.fixture
def samples(drawn_data, tokens):
    return Samples(drawn_data, "train", tokens)


def test_a_batch_of_chosen_groups(samples, drawn_data, tokens):
    folder = chunk_folders(drawn_data, "train")[0]
    chunk, latents = read_chunk(folder), load_file(latents_file(folder))
    batch = samples.batch([(0, 2), (0, 0)])
    assert [len(stored.names) for stored, _ in samples.chunks] == [3]
    assert batch.photo_b.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.pixels_pchw.shape == (2, 3, 112, 112)
    assert torch.equal(batch.names_pt, torch.stack([tokens.text(chunk.names[i]) for i in (2, 0)]))
    assert np.array_equal(batch.mask_ps[1].numpy(), chunk.masks_nhw[0, ::8, ::8].flatten())
    assert np.allclose(batch.coverage_bs[:4].numpy() * 255, chunk.coverage_nkhw[2].reshape(4, -1))
    assert batch.strength_b.tolist() == pytest.approx([*chunk.strengths[2], *chunk.strengths[0]])
    texts = tokens.prompts([chunk.names[2]] * 4, chunk.prompts[2])
    assert torch.equal(batch.texts.text_bt[:4], texts.text_bt)
    mean, std = latents["targets_nkschw"][2].float().unbind(1)
    assert batch.targets_bchw[:4].shape == mean.shape
    noise = (batch.targets_bchw[:4] - mean)[std > 0.1] / std[std > 0.1]
    assert 0.9 < float(noise.std()) < 1.1


def test_the_subject_stands_on_white_in_clips_normalization(samples):
    pixels = samples.batch([(0, 0)]).pixels_pchw
    white = pixels.amax((0, 2, 3))
    assert white.tolist() == pytest.approx([(1 - 0.48145466) / 0.26862954, 2.0749, 2.1459], abs=1e-3)
    assert torch.equal(pixels[0, :, 0, 0], white)


def test_draws_are_the_generators(samples):
    first, again, other = (samples.draw(np.random.default_rng(seed), 2) for seed in (0, 0, 5))
    assert torch.equal(first.names_pt, again.names_pt)
    assert torch.equal(first.texts.text_bt, again.texts.text_bt)
    assert not torch.equal(first.texts.text_bt, other.texts.text_bt)


def test_nothing_is_encoded(data, tokens):
    latents_file(chunk_folders(data, "train")[0]).unlink()
    with pytest.raises(InputError, match="has no encoded pictures; first run: python -m examples.mini_moma vae"):
        Samples(data, "train", tokens)
