"""Compares the contenders' pictures of the same requests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.environment import percentiles
from benchmarks.latency.requests import ORIGINALS, RUNTIME, Answer
from benchmarks.picture_difference import difference, psnr


def agreement(warm: Mapping[str, Sequence[Answer]]) -> dict[str, float] | None:
    """Compare the runtime with the original: lowest PSNR of pictures, largest mean difference of foreground masks.

    Returns None if no baseline generates the same picture.

    Args:
        warm: the answers of each contender to the same requests.
    """
    pairs = [pair for name in ORIGINALS if name in warm for pair in zip(warm[RUNTIME], warm[name], strict=True)]
    if not pairs:
        return None
    return {
        "psnr_db": round(min(psnr(ours.image, original.image) for ours, original in pairs), 1),
        "foreground_difference": round(
            max(float(np.abs(ours.foreground_mask - original.foreground_mask).mean()) for ours, original in pairs), 6
        ),
    }


def replays(answers: Mapping[str, Sequence[Answer]], steps: int) -> dict[str, Any] | None:
    """Summarize requests that replayed a CUDA graph: their number, and host microseconds per step; None without any.

    `largest_difference` compares the pictures of "warm" and "warm_watched", in steps of 1/255; None if the latter was
    not measured.
    """
    seconds = [a.replay_seconds for of_kind in answers.values() for a in of_kind if a.replay_seconds is not None]
    if not seconds:
        return None
    pairs = list(zip(answers["warm"], answers.get("warm_watched", ()), strict=False))
    apart = [difference(one.image, other.image) for one, other in pairs]
    return {
        "requests": len(seconds),
        "host_us_per_step": percentiles([1e6 * value / steps for value in seconds]),
        "largest_difference": max(apart, default=None),
    }
