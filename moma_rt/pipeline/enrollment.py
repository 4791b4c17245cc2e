"""Reference pass: keys and values of a photo's subject, which the denoiser injects into its self-attention."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moma_rt.backends.base import Array
from moma_rt.bundle.specs import Geometry
from moma_rt.memory.networks import Networks
from moma_rt.messages import warn
from moma_rt.timing import StageTimer


@dataclass(frozen=True)
class ReferenceNoise:
    """Noise of the VAE's latent sample and of the noising at t = 0, float32 [1,4,h,w] each."""

    vae: NDArray[np.float32]
    reference: NDArray[np.float32]


def reference_pass(
    networks: Networks, photo_bchw: Array, noise: ReferenceNoise, text_tokens: Array, stages: StageTimer
) -> dict[str, Array]:
    """Compute the reference keys and values of a whole photo.

    Args:
        photo_bchw: float32 [1,3,H,W] in [-1, 1].
        text_tokens: float32 [77,768], of the subject's name alone.

    Returns:
        `reference_k.<layer>` and `reference_v.<layer>`, float32 [1,g*g,C] each.
    """
    latents = networks.run("vae_encoder", {"image": photo_bchw, "noise": noise.vae}, stages)["latents"]
    inputs = {"latents": latents, "noise": noise.reference, "text_tokens": text_tokens[None]}
    return networks.run("subject_encoder", inputs, stages)


@dataclass(frozen=True)
class Reference:
    """Keys and values [N_g,C] by layer, and the object mask, float32 [N_g], by grid."""

    keys: dict[str, Array]
    values: dict[str, Array]
    object_mask: dict[int, Array]


def keep_masked_tokens(geometry: Geometry, mask_hw: NDArray[np.bool_], full: Mapping[str, Array]) -> Reference:
    """Drop the tokens outside the mask. They get no attention, so pictures do not change.

    The mask is sampled at every (H/g)-th pixel, as in the original. If a grid has no token inside, the original
    attends uniformly to all its tokens; zero keys with a mask of ones do the same. Warns if even the finest grid has
    none: the reference then holds nothing of the subject's own appearance.
    """
    keys: dict[str, Array] = {}
    values: dict[str, Array] = {}
    masks: dict[int, Array] = {}
    inside = {grid: _sample(mask_hw, geometry.image_size // grid) for grid in geometry.grids}
    finest = geometry.grids[0]
    if not inside[finest].any():
        warn(
            f"the mask is so small that none of the {finest}x{finest} sampled points is inside it: "
            "the reference is a plain average of the whole photo, as in the original MoMA"
        )
    for layer in geometry.self_attention:
        k, v = full[f"reference_k.{layer.name}"][0], full[f"reference_v.{layer.name}"][0]
        kept = inside[layer.grid]
        if kept.any():
            keys[layer.name], values[layer.name] = k[kept], v[kept]
        else:
            keys[layer.name], values[layer.name] = np.zeros_like(k), v
        masks[layer.grid] = np.ones(len(keys[layer.name]), np.float32)
    return Reference(keys, values, masks)


def _sample(mask_hw: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    return mask_hw[::stride, ::stride].reshape(-1)
