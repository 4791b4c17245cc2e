"""What the pictures of the soak benchmark have to be: each request of the pool, made when there is no other."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.soak.requests import SUBJECTS, PictureRequest, photo_and_mask
from moma_rt.errors import MomaError
from moma_rt.runtime import Runtime

# The pictures of a request, uint8 [H,W,RGB] each.
Images = Sequence[np.ndarray]


@dataclass(frozen=True, eq=False)
class Reference:
    """A request's pictures as they are when it is the only one: all at once, as they were asked for.

    singly: each of them asked for by itself.
    batched: each as the first of a batch of others, for each of some sizes of batches.
    """

    asked: Images
    singly: Images = ()
    batched: Sequence[Images] = ()

    def of(self, index: int) -> list[np.ndarray]:
        """Everything that one of the pictures may be."""
        return [images[index] for images in (self.asked, self.singly, *self.batched) if images]


def references(
    bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path, batches: Sequence[int] = ()
) -> list[Reference]:
    """The pictures of each request, made one request at a time by a process that ends; it leaves its subjects in
    `folder`.

    batches: numbers of pictures that may be made together.

    Raises:
        MomaError: what went wrong there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_made_alone, bundle, backend, requests, folder, batches).result()
        except BrokenProcessPool:
            raise MomaError(
                "the process that makes each request alone was killed; there may be too little memory"
            ) from None


def subject_file(folder: Path, name: str) -> Path:
    """Where one of `SUBJECTS` is saved."""
    return folder / f"{SUBJECTS.index(name)}.subject"


def load_repeatable(bundle: Path, backend: str, **limits: int) -> Runtime:
    """A runtime whose pictures are, to the bit, those of another process that loads one this way."""
    runtime = Runtime.load(bundle, backend, **limits)
    if backend == "inductor":
        import torch

        # On a GPU it has cuDNN measure which convolutions are the fastest: two processes may choose others, which round
        # otherwise. No network is loaded yet, so all are chosen by rule now; the soak may be a little slower for it.
        torch.backends.cudnn.benchmark = False
    return runtime


def _made_alone(
    bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path, batches: Sequence[int]
) -> list[Reference]:
    runtime = load_repeatable(bundle, backend)
    width = runtime.bundle.manifest.geometry.embedding_width
    subjects = {name: runtime.enroll(*photo_and_mask(name), name) for name in SUBJECTS}
    for name, subject in subjects.items():
        subject.save(subject_file(folder, name))

    def made(request: PictureRequest, count: int) -> Images:
        options = {**request.options(width), "num_images": count}
        return [np.asarray(image) for image in runtime.generate(subjects[request.subject], **options).images]

    found = []
    for request in requests:
        singles = request.single()
        asked = made(request, request.num_images)
        singly = asked if len(singles) == 1 else [made(one, 1)[0] for one in singles]
        found.append(Reference(asked, singly, [[made(one, count)[0] for one in singles] for count in batches]))
    return found
