"""Batches of training samples for everything behind the VAE."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from examples.mini_moma.groups import GRID, Chunk, chunk_folders, read_chunk
from examples.mini_moma.model import Texts, Tokens
from examples.mini_moma.scenes import SIDE
from examples.mini_moma.vae import latents_file
from export.checkpoints.presets import MINI
from moma_rt.errors import InputError
from moma_rt.inputs.images import prepare


@dataclass(frozen=True, eq=False)
class Batch:
    """P photos and K pictures of each, B = P * K in all.

    Attributes:
        pixels_pchw: float [P, 3, 112, 112], the subjects on white for the vision encoder.
        photos_pchw: float [P, 4, 16, 16], latents of the photos, sampled.
        mask_ps: float [P, 256], 1 on the photo's subject.
        names_pt: int64 [P, 77], ids of the bare names.
        targets_bchw: float [B, 4, 16, 16], latents of the pictures, sampled.
        coverage_bs: float [B, 256], the share of a cell that the subject covers.
        strength_b: float [B].
        texts: of the prompts.
        photo_b: int64 [B], which photo a picture belongs to.
    """

    pixels_pchw: Tensor
    photos_pchw: Tensor
    mask_ps: Tensor
    names_pt: Tensor
    targets_bchw: Tensor
    coverage_bs: Tensor
    strength_b: Tensor
    texts: Texts
    photo_b: Tensor


class Samples:
    """All encoded groups of a split, "train" or "heldout".

    Raises:
        InputError: nothing is encoded yet.
    """

    def __init__(self, data: Path, split: str, tokens: Tokens) -> None:
        folders = [folder for folder in chunk_folders(data, split) if latents_file(folder).exists()]
        if not folders:
            raise InputError(f"{data} has no encoded pictures; first run: python -m examples.mini_moma vae")
        self.tokens = tokens
        self.chunks = [(read_chunk(folder), load_file(latents_file(folder))) for folder in folders]

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Draw `size` groups, with replacement."""
        picked = [(rng.integers(len(self.chunks)), rng.integers(len(self.chunks[0][0].names))) for _ in range(size)]
        return self.batch([(int(chunk), int(group)) for chunk, group in picked])

    def batch(self, picked: Sequence[tuple[int, int]]) -> Batch:
        """Make the batch of some groups, each given by its chunk and its place in that; latents are sampled anew."""
        names, prompts, pixels, masks, photos, targets, coverage, strengths = ([] for _ in range(8))
        for chunk_index, group in picked:
            chunk, latents = self.chunks[chunk_index]
            count = len(chunk.prompts[group])
            names += [chunk.names[group]] * count
            prompts += chunk.prompts[group]
            strengths += chunk.strengths[group]
            pixels.append(_pixels(chunk, group))
            masks.append(torch.from_numpy(chunk.masks_nhw[group, :: SIDE // GRID, :: SIDE // GRID].copy()).float())
            photos.append(latents["photos_nschw"][group])
            targets.append(latents["targets_nkschw"][group])
            coverage.append(torch.from_numpy(chunk.coverage_nkhw[group].copy()).float() / 255)
        photo_b = torch.arange(len(picked)).repeat_interleave(len(names) // len(picked))
        return Batch(
            pixels_pchw=torch.cat(pixels),
            photos_pchw=_sample(torch.stack(photos)),
            mask_ps=torch.stack(masks).flatten(1),
            names_pt=torch.stack([self.tokens.text(name) for name in names[:: len(names) // len(picked)]]),
            targets_bchw=_sample(torch.cat(targets)),
            coverage_bs=torch.cat(coverage).flatten(1),
            strength_b=torch.tensor(strengths),
            texts=self.tokens.prompts(names, prompts),
            photo_b=photo_b,
        )


def _pixels(chunk: Chunk, group: int) -> Tensor:
    photo, mask = (Image.fromarray(np.array(array[group])) for array in (chunk.photos_nhwc, chunk.masks_nhw))
    with warnings.catch_warnings():
        # Of very thin subjects.
        warnings.simplefilter("ignore")
        prepared = prepare(photo, mask.convert("L"), SIDE, MINI.vision["image_size"])
    return torch.from_numpy(prepared.pixels)


def _sample(statistics_nschw: Tensor) -> Tensor:
    """Sample latents [N, 4, 16, 16] of means and standard deviations [N, 2, 4, 16, 16]."""
    mean, std = statistics_nschw.float().unbind(1)
    return mean + std * torch.randn_like(mean)
