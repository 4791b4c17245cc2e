"""Makes renders look like generated pictures: blurred, lumpy, noisy, with colours a little off."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from examples.mini_moma.scenes import hue_rotation

# A VAE of 24 dB loses about as much as the strongest of these.
_MOST_BLUR, _MOST_SHRINKING = 1.6, 2.6
_LUMPS = 0.03


class Softener:
    """Random softening; the same sequence for the same seed."""

    def __init__(self, seed: int) -> None:
        self._torch = torch.Generator().manual_seed(seed)
        self._numpy = np.random.default_rng(seed)

    def __call__(self, pictures_nchw: Tensor, masks_nhw: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Soften pictures, 0..255 [N, 3, S, S]; masks, 0..1 [N, S, S], are bent and mirrored with them.

        Returns:
            Pictures, 0..255 in whole numbers, and masks of the same shapes.
        """
        masks = None if masks_nhw is None else masks_nhw[:, None]
        if masks is not None and self._numpy.random() < 0.5:
            pictures_nchw, masks = pictures_nchw.flip(3), masks.flip(3)
        if self._numpy.random() < 0.6:
            grid = self._bent_grid(pictures_nchw)
            pictures_nchw = _sampled(pictures_nchw, grid)
            masks = None if masks is None else _sampled(masks, grid)
        # One kind for each quarter of a batch: so the work is shared.
        quarters = [self._softened(part) for part in pictures_nchw.split(max(1, len(pictures_nchw) // 4))]
        pictures = self._discoloured(torch.cat(quarters))
        return pictures.round().clamp(0, 255), None if masks is None else masks[:, 0]

    def _softened(self, pictures: Tensor) -> Tensor:
        kind = self._numpy.integers(4)
        if kind == 0:
            return pictures
        if kind == 1:
            return _blurred(pictures, float(self._numpy.uniform(0.5, _MOST_BLUR)))
        if kind == 2:
            return _shrunk(pictures, float(self._numpy.uniform(1.3, _MOST_SHRINKING)))
        return _compressed(pictures, int(self._numpy.integers(12, 60)))

    def _discoloured(self, pictures: Tensor) -> Tensor:
        count = len(pictures)
        contrast = 1 + 0.1 * self._normal(count, 1, 1, 1)
        shift = 6 * self._normal(count, 1, 1, 1) + 4 * self._normal(count, 3, 1, 1)
        noise = 3 * torch.rand(count, 1, 1, 1, generator=self._torch) * self._normal(*pictures.shape)
        return (pictures - 127.5) * contrast + 127.5 + shift + noise

    def _bent_grid(self, pictures: Tensor) -> Tensor:
        """A sampling grid [N, S, S, 2] with smooth displacements of some pixels."""
        count, side = len(pictures), pictures.shape[-1]
        coarse = _LUMPS * self._normal(count, 2, 8, 8)
        bend = functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
        straight = torch.eye(2, 3).expand(count, 2, 3)
        regular = functional.affine_grid(straight, [count, 3, side, side], align_corners=False)
        return regular + bend.permute(0, 2, 3, 1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._torch)


def hue_turned(cutouts_nchw: Tensor, angles_n: Tensor) -> Tensor:
    """Turn all colours about the gray axis by an angle for each cut-out; white stays white."""
    rotations = np.stack([hue_rotation(angle) for angle in angles_n.tolist()]).astype(np.float32)
    return torch.einsum("nij,njhw->nihw", torch.from_numpy(rotations), cutouts_nchw).clamp(0, 255)


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _blurred(pictures: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(2.5 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(pictures, (reach, reach, reach, reach), mode="reflect")
    return functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _shrunk(pictures: Tensor, factor: float) -> Tensor:
    side = pictures.shape[-1]
    small = functional.interpolate(
        pictures, size=[round(side / factor)] * 2, mode="bilinear", antialias=True, align_corners=False
    )
    return functional.interpolate(small, size=[side, side], mode="bicubic", align_corners=False)


def _compressed(pictures: Tensor, quality: int) -> Tensor:
    made = []
    for picture in pictures.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        made.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()
