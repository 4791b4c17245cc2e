"""Inputs for comparing and benchmarking networks: random, but shaped like those of a real generation."""

import numpy as np

from moma_rt.backends.base import Array
from moma_rt.bundle.specs import Geometry, NetworkSpec, TensorSpec
from moma_rt.schedulers.tables import Column, schedule

_STEPS, _STEP_NUMBER, _GUIDANCE_SCALE = 50, 25, 7.5
_SUBJECT_TOKENS = [4, 7]
# Every vocabulary has the token ids below this.
_COMMON_TOKEN_IDS = 256

Sizes = dict[str, int]


def usual_sizes(spec: NetworkSpec) -> Sizes:
    """Return the size of each dynamic dimension for which the network is tuned."""
    return {d.name: d.opt for tensor in spec.inputs for d in tensor.dynamic_axes.values()}


def sample_inputs(spec: NetworkSpec, geometry: Geometry, sizes: Sizes, seed: int = 0) -> dict[str, Array]:
    """Return one array per input, in the spec's dtypes; the same on every call.

    A denoising step is from the middle of a generation, with all reference tokens inside the object mask; a prompt's
    positions follow those of the past K/V.
    """
    random = np.random.default_rng(seed)
    return {t.name: _sample(t, geometry, sizes, random).astype(t.dtype, copy=False) for t in spec.inputs}


def _sample(tensor: TensorSpec, geometry: Geometry, sizes: Sizes, random: np.random.Generator) -> Array:
    shape, name = tensor.resolve(**sizes), tensor.name
    if name == "schedule_row":
        row = schedule("ddim", _STEPS, _GUIDANCE_SCALE)[_STEP_NUMBER]
        assert row[Column.INJECTION] == 1.0
        return row
    if name == "token_ids":
        ids = random.integers(3, _COMMON_TOKEN_IDS, shape)
        if geometry.language is not None and "image_sequence" in sizes:
            count = min(shape[1] // 2, sizes["image_sequence"])
            ids[:, :count] = geometry.language.vocabulary + np.arange(count)
        return ids
    if name == "positions":
        return sizes["past"] + np.arange(shape[1])[None]
    if name == "strength" or name.startswith("object_mask."):
        return np.ones(shape)
    if name == "subject_weights":
        weights = np.zeros(shape)
        weights[:, _SUBJECT_TOKENS] = 1.0
        return weights
    if name == "foreground_mask":
        return random.random(shape, np.float32)
    if name == "image":
        return random.uniform(-1.0, 1.0, shape)
    return random.standard_normal(shape, np.float32)
