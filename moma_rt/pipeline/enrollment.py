"""The reference pass: from a photo and its mask to the keys and values that are injected into the denoiser."""

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
    """The two draws of an enrolment, float32 [1,4,h,w] each: of the VAE's sample, and of the noising at t = 0."""

    vae: NDArray[np.float32]
    reference: NDArray[np.float32]


def reference_pass(
    networks: Networks, photo_bchw: Array, noise: ReferenceNoise, text_tokens: Array, stages: StageTimer
) -> dict[str, Array]:
    """All reference keys and values of a photo.

    Args:
        photo_bchw: float32 [1,3,H,W] in [-1, 1].
        text_tokens: float32 [77,768], those of the subject's bare name.

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
    """Keep only the tokens inside the mask: those outside never contribute, so this changes nothing.

    The mask is sampled at every (H/g)-th pixel, as the original does. Where that leaves no token, the original
    attends to all of them uniformly; zero keys with a full mask do just that. Warns where even the finest grid has
    none: nothing of the subject's own appearance is left then.
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
