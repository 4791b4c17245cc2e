"""The second half of the last stage: UNet, text encoder, adapters and context encoder learn together."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.mini_moma import muon
from examples.mini_moma.attention import Photos, Pictures, min_max
from examples.mini_moma.batches import Batch, Samples
from examples.mini_moma.context import SubjectReader
from examples.mini_moma.groups import GRID
from examples.mini_moma.model import EMBEDDING, MiniMoma, Tokens
from export.models.unet import FOREGROUND_THRESHOLD
from moma_rt.schedulers.solvers import TRAINING_STEPS
from moma_rt.schedulers.tables import INJECTION_BELOW, alphas_cumprod

_PHOTOS = 4
# Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023.
_MOST_SNR = 5.0


@dataclass(frozen=True)
class Recipe:
    """What is dropped, and how parts of the loss are weighted.

    Attributes:
        unconditional: share of pictures without text and context, for guidance.
        without_reference: share of pictures for which only the context tokens show the subject.
        own_foreground: share of pictures whose foreground mask is the model's own from a step before, as in generation;
            with true masks alone, the mask shrinks to a dot when it feeds back.
        foreground_weight: additional weight of the subject's area.
        saliency_weight: of the mask's error.
        reader_weight: of the error of what is read from the embedding, so that it goes on saying what the photo shows.
    """

    unconditional: float = 0.15
    without_reference: float = 0.2
    own_foreground: float = 0.4
    foreground_weight: float = 1.0
    saliency_weight: float = 0.2
    reader_weight: float = 0.05


class JointTask:
    """Noise prediction of pictures from prompts, photos and context tokens, in the original's semantics."""

    def __init__(self, data: Path, context: dict[str, Tensor], recipe: Recipe) -> None:
        self.recipe, self.tokens = recipe, Tokens(data)
        self.samples = Samples(data, "train", self.tokens)
        self.model, self.reader = MiniMoma(self.tokens), SubjectReader()
        self.module: nn.Module = nn.ModuleDict({"model": self.model, "reader": self.reader})
        parts = {"context.": self.model.context, "reader.": self.reader}
        for prefix, part in parts.items():
            part.load_state_dict({n.removeprefix(prefix): t for n, t in context.items() if n.startswith(prefix)})
        self.alphas = torch.from_numpy(alphas_cumprod()).float()
        snr = self.alphas / (1 - self.alphas)
        weights = snr.clamp(max=_MOST_SNR) / snr
        self.weights = weights / weights.mean()

    def uses_muon(self, name: str, parameter: nn.Parameter) -> bool:
        """Return True for the matrices of UNet and attention adapters."""
        return name.startswith("model.unet.") and "time_emb" not in name and muon.suits(parameter)

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch, with its parts: noise inside and outside the subject, mask, embedding."""
        recipe, batch = self.recipe, self.samples.draw(rng, _PHOTOS)
        count = len(batch.photo_b)
        # One from each of as many equal parts of the schedule: less noise in the gradient than independent draws.
        t_b = (
            ((torch.randperm(count) + torch.rand(count)) / count * TRAINING_STEPS).long().clamp(max=TRAINING_STEPS - 1)
        )
        eps = torch.randn_like(batch.targets_bchw)
        embedding = self.model.context(batch.pixels_pchw, self.tokens.before, batch.texts, batch.photo_b)
        reader_error, explained = self.reader.error(embedding, batch)
        conditions = self._conditions(batch, embedding)
        strength = _varied(batch.strength_b)
        strength[torch.rand(count) < recipe.without_reference] = 0
        foreground = self._foreground(conditions, batch, (t_b, eps, strength))
        conditions = self._dropped(conditions, torch.rand(count) < recipe.unconditional)
        state = _pictures(conditions, batch, foreground, torch.where(t_b < INJECTION_BELOW, strength, 0.0))
        noised = self._noised(batch.targets_bchw, t_b, eps)
        predicted, saliency = self.model(noised, t_b, conditions.text_btc, state)
        coverage = batch.coverage_bs
        error_bs = (predicted - eps).square().mean(1).flatten(1)
        area = 1 + recipe.foreground_weight * coverage
        noise = ((error_bs * area).sum(1) / area.sum(1) * self.weights[t_b]).mean()
        # The raw map too: the mask is scaled over both guidance halves, so their values must be comparable.
        mask = (min_max(saliency) - coverage).square().mean() + (saliency - coverage).square().mean()
        loss = noise + recipe.saliency_weight * mask + recipe.reader_weight * reader_error
        inside, outside = _mean_of(error_bs, coverage), _mean_of(error_bs, 1 - coverage)
        shown = {"inside": inside, "outside": outside, "mask": mask.item() / 2, "r2": explained.item()}
        return loss, {"loss": loss.item(), **shown}

    def _conditions(self, batch: Batch, embedding: Tensor) -> "_Conditions":
        zero = torch.zeros(len(batch.photos_pchw), dtype=torch.long)
        noised = self._noised(batch.photos_pchw, zero, torch.randn_like(batch.photos_pchw))
        photos = self.model.read_photos(noised, batch.names_pt)
        text = self.model.encode_text(batch.texts.text_bt)
        return _Conditions(text, self.model.context_tokens(embedding), photos)

    def _dropped(self, conditions: "_Conditions", is_dropped: Tensor) -> "_Conditions":
        """Replace text and context of some pictures by those of the unconditional half."""
        text = self.model.encode_text(self.tokens.text("")[None])
        context = self.model.context_tokens(torch.zeros(1, EMBEDDING))
        rows = is_dropped[:, None, None]
        return _Conditions(
            torch.where(rows, text, conditions.text_btc),
            torch.where(rows, context, conditions.context_bmc),
            conditions.photos,
        )

    def _noised(self, latents: Tensor, t_b: Tensor, eps: Tensor) -> Tensor:
        alpha = self.alphas[t_b].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * eps
        return noised.contiguous(memory_format=torch.channels_last)

    def _foreground(self, conditions: "_Conditions", batch: Batch, noise: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return masks [B, S]: the model's own of an earlier step, all ones, the true one, or that one blurred.

        Its own are of the conditions with text, for unconditional pictures too: both halves use that one.
        """
        t_b, eps, strength = noise
        true = batch.coverage_bs
        square = true.unflatten(1, (1, GRID, GRID))
        blurred = functional.avg_pool2d(functional.max_pool2d(square, 3, 1, 1), 5, 1, 2).flatten(1)
        kind = torch.rand(len(true), 1)
        given = torch.where(kind < 0.5, (true * 1.3).clamp(max=1), blurred)
        mask = torch.where(kind > 0.9, torch.ones_like(true), given)
        (own,) = torch.nonzero(torch.rand(len(true)) < self.recipe.own_foreground, as_tuple=True)
        if len(own):
            earlier = (t_b + torch.randint(20, 100, t_b.shape)).clamp(max=TRAINING_STEPS - 1)
            with torch.no_grad():
                injected = torch.where(earlier < INJECTION_BELOW, strength, 0.0)
                known = torch.where((earlier >= INJECTION_BELOW)[:, None], torch.ones_like(mask), mask)
                state = _rows(_pictures(conditions, batch, known, injected), own)
                noised = self._noised(batch.targets_bchw, earlier, eps)[own]
                _, saliency = self.model(noised, earlier[own], conditions.text_btc[own], state)
            mask[own] = threshold(min_max(saliency))
        # The first steps of generation know no mask.
        return torch.where((t_b >= INJECTION_BELOW)[:, None], torch.ones_like(mask), mask)


@dataclass(frozen=True)
class _Conditions:
    text_btc: Tensor
    context_bmc: Tensor
    photos: Photos


def threshold(mask: Tensor) -> Tensor:
    """Set values that are not above 0.2 to 0, as the original does."""
    return torch.where(mask > FOREGROUND_THRESHOLD, mask, 0.0)


def _pictures(conditions: _Conditions, batch: Batch, foreground: Tensor, strength: Tensor) -> Pictures:
    return Pictures(
        photos=conditions.photos,
        photo_b=batch.photo_b,
        mask_pn=batch.mask_ps,
        foreground_bs=foreground,
        strength_b=strength,
        context_bmc=conditions.context_bmc,
        subject_bt=batch.texts.subject_bt,
    )


def _rows(state: Pictures, rows: Tensor) -> Pictures:
    return Pictures(
        photos=state.photos,
        photo_b=state.photo_b[rows],
        mask_pn=state.mask_pn,
        foreground_bs=state.foreground_bs[rows],
        strength_b=state.strength_b[rows],
        context_bmc=state.context_bmc[rows],
        subject_bt=state.subject_bt[rows],
    )


def _varied(strength: Tensor) -> Tensor:
    """Vary 1.0 to 0.8..1.2 and 0.4 to 0.3..0.6, the useful ranges."""
    low, high = torch.where(strength < 0.7, 0.3, 0.8), torch.where(strength < 0.7, 0.6, 1.2)
    return torch.where(torch.rand_like(strength) < 0.5, strength, low + (high - low) * torch.rand_like(strength))


def _mean_of(error_bs: Tensor, weight_bs: Tensor) -> float:
    return float((error_bs.detach() * weight_bs).sum() / weight_bs.sum())
