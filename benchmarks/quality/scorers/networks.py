"""The scorers in PyTorch. Their inputs are pictures as they are, so that nothing is to be done before them."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.scorers.scorer import EMBEDDING_WIDTH, GROUNDS, MATERIALS


class Reader(nn.Module):
    """Tells a picture's context, its subject's material, and where the subject is.

    Takes uint8 [N, 128, 128, RGB], and looks at half that resolution, finer than any detail of a small model's
    pictures. Returns logits [N, 13] of `GROUNDS`, logits [N, 5] of `MATERIALS`, and logits [N, 32, 32] of the subject's
    mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at_32 = _convolution(3, 24, stride=2, kernel=5)
        self.at_16 = nn.Sequential(_convolution(24, 48, stride=2), _convolution(48, 48))
        self.at_8 = nn.Sequential(_convolution(48, 72, stride=2), _convolution(72, 72))
        self.at_4 = nn.Sequential(_convolution(72, 96, stride=2), _convolution(96, 96))
        self.up_8 = _Up(96, 48, 72, 48)
        self.up_16 = _Up(48, 32, 48, 32)
        self.up_32 = _Up(32, 16, 24, 24)
        self.mask = nn.Conv2d(24, 1, 1)
        self.ground = nn.Linear(3 * 72 + 96, len(GROUNDS))
        self.material = nn.Linear(2 * 72, len(MATERIALS))

    def forward(self, picture_nhwc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_32 = self.at_32(functional.avg_pool2d(_normalized(picture_nhwc), 2))
        at_16 = self.at_16(at_32)
        at_8 = self.at_8(at_16)
        at_4 = self.at_4(at_8)
        mask = self.mask(self.up_32(self.up_16(self.up_8(at_4, at_8), at_16), at_32))
        # Sky and ground are told apart by where they are: the upper and the lower half count by themselves.
        halves = [at_8[:, :, :4].mean((2, 3)), at_8[:, :, 4:].mean((2, 3)), at_8.amax((2, 3))]
        ground = self.ground(torch.cat([*halves, at_4.mean((2, 3))], 1))
        # The material is that of what the mask marks, whatever the ground is.
        inside = functional.avg_pool2d(torch.sigmoid(mask.detach()), 4)
        subject = (at_8 * inside).sum((2, 3)) / (inside.sum((2, 3)) + 1e-3)
        return ground, self.material(torch.cat([subject, at_8.mean((2, 3))], 1)), mask[:, 0]


class Embedder(nn.Module):
    """Embeds a cut-out subject, uint8 [N, 64, 64, RGB] on white, as unit vectors [N, 64]: close for one subject."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, 24, stride=2, kernel=5),
            _convolution(24, 48, stride=2),
            _convolution(48, 72, stride=2),
            _convolution(72, 72),
            _convolution(72, 96, stride=2),
        )
        self.head = nn.Linear(96 * 16, EMBEDDING_WIDTH)

    def forward(self, cutout_nhwc: Tensor) -> Tensor:
        features = self.features(_normalized(cutout_nhwc))
        return functional.normalize(self.head(features.flatten(1)), dim=1)


class _Up(nn.Module):
    """Doubles a grid and joins it with the one of that size on the way down."""

    def __init__(self, below: int, narrowed: int, beside: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(below, narrowed, 1)
        self.join = _convolution(narrowed + beside, width)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        doubled = functional.interpolate(self.narrow(below), scale_factor=2.0, mode="nearest")
        return cast(Tensor, self.join(torch.cat([doubled, beside], 1)))


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _normalized(picture_nhwc: Tensor) -> Tensor:
    return picture_nhwc.float().permute(0, 3, 1, 2) / 127.5 - 1
