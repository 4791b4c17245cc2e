"""Helpers that let a runtime on real networks batch the requests of several threads."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from moma_rt.pipeline.request import Result
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject
from tests.moma_rt.waiting import wait_until

# A subject, a prompt, and further arguments of `Runtime.generate`.
Call = tuple[Subject, str, dict[str, Any]]


def four_subjects(runtime: Runtime, photo: Image.Image, mask: Image.Image) -> list[Subject]:
    """Enroll four subjects with different photos and numbers of reference tokens."""
    subjects = []
    for index, name in enumerate(("car", "cup", "red hat", "dog")):
        smaller = mask.crop((0, 0, mask.width, mask.height - mask.height // 6 * index)).resize(mask.size)
        smaller.paste(0, (0, 0, mask.width // 8 * index, mask.height))
        subjects.append(runtime.enroll(photo.rotate(90 * index), smaller, name))
    assert len({tuple(subject.token_counts().values()) for subject in subjects}) > 1
    return subjects


def calls_of(subjects: Sequence[Subject], **options: Any) -> list[Call]:
    """One call for each subject, each with its own prompt, seed and strength."""
    return [
        (subject, f"A {subject.name}.", {"seed": i, "strength": 0.5 + 0.2 * i, **options})
        for i, subject in enumerate(subjects)
    ]


def run_queued(runtime: Runtime, calls: Sequence[Call], **options: Any) -> list[Any]:
    """Results or errors of calls that are all queued while another one, of the first subject, runs."""
    found: dict[int, Any] = {}
    threads: list[threading.Thread] = []

    def work(index: int) -> None:
        subject, prompt, call_options = calls[index]
        try:
            found[index] = runtime.generate(subject, prompt, **call_options)
        except Exception as error:
            found[index] = error

    def gather(_: object) -> None:
        if not threads:
            threads.extend(threading.Thread(target=work, args=(index,)) for index in range(len(calls)))
            for thread in threads:
                thread.start()
            wait_until(lambda: len(runtime._queue._waiting) >= len(calls))

    runtime.generate(calls[0][0], "A car.", steps=1, on_step=gather, **options)
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(calls))]


def assert_same(found: Result, wanted: Result) -> None:
    """Pictures within a level, and masks within 1e-4."""
    for image, expected in zip(found.images, wanted.images, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    np.testing.assert_allclose(found.foreground_masks, wanted.foreground_masks, atol=1e-4)


def check_four_subjects(runtime: Runtime, subjects: Sequence[Subject], **options: Any) -> None:
    """A batch of four subjects makes the same pictures as single requests."""
    calls = calls_of(subjects, steps=2, **options)
    expected = [runtime.generate(subject, prompt, **call_options) for subject, prompt, call_options in calls]
    found = run_queued(runtime, calls, **options)
    # They shared a batch: each reports the time of the whole batch.
    assert len({result.seconds["denoiser"] for result in found}) == 1
    for result, wanted in zip(found, expected, strict=True):
        assert_same(result, wanted)
    assert len({result.images[0].tobytes() for result in found}) == len(calls), "no two are one picture"
