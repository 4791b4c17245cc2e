"""The first half of the last stage: the context embedding learns to say what the photo shows.

Without it the language model's last state says the same of every photo, and the UNet learns to ignore it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.mini_moma.batches import Batch, Samples
from examples.mini_moma.model import EMBEDDING, ContextEncoder, Tokens

_PHOTOS = 12
# The subject on white, as so many cells a side.
_CELLS = 8


class SubjectReader(nn.Module):
    """Reads from an embedding what its photo shows: the subject on white in 8x8 cells, and the mean of its colors."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(EMBEDDING, 3 * _CELLS**2 + 3)

    def error(self, embedding_bd: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean squared error, and the share of the variance that is explained (R²)."""
        cells = functional.adaptive_avg_pool2d(batch.pixels_pchw, _CELLS)
        # White is the largest value of each channel.
        white = batch.pixels_pchw.amax((0, 2, 3), keepdim=True)
        colored = (batch.pixels_pchw - white) * (batch.pixels_pchw < white - 0.01).any(1, keepdim=True)
        mean = colored.sum((2, 3)) / (colored != 0).any(1, keepdim=True).sum((2, 3)).clamp_min(1)
        wanted = torch.cat([cells.flatten(1), 2 * mean], 1)[batch.photo_b]
        error = (self.read(embedding_bd) - wanted).square().mean()
        return error, 1 - error.detach() / wanted.var(0).mean()


class ContextTask:
    """Regression of what the photo shows from the context embedding."""

    def __init__(self, data: Path) -> None:
        self.tokens = Tokens(data)
        self.samples = Samples(data, "train", self.tokens)
        self.encoder, self.reader = ContextEncoder(self.tokens.language_vocabulary), SubjectReader()
        self.module: nn.Module = nn.ModuleDict({"context": self.encoder, "reader": self.reader})

    def uses_muon(self, name: str, parameter: nn.Parameter) -> bool:
        """Return False: AdamW trains all."""
        return False

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mean squared error of a batch, and R²."""
        batch = self.samples.draw(rng, _PHOTOS)
        embedding = self.encoder(batch.pixels_pchw, self.tokens.before, batch.texts, batch.photo_b)
        error, explained = self.reader.error(embedding, batch)
        return error, {"mse": error.item(), "r2": explained.item()}
