"""Reference pictures of the soak test: each request of the pool, generated while no other request runs."""

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
    """A request's pictures, generated while no other request runs.

    Attributes:
        asked: generated in one call, as the request asks for them.
        singly: each generated in a call of its own.
        batched: each as the first picture of a batch, for several batch sizes.
    """

    asked: Images
    singly: Images = ()
    batched: Sequence[Images] = ()

    def of(self, index: int) -> list[np.ndarray]:
        """Return all references of one of the pictures."""
        return [images[index] for images in (self.asked, self.singly, *self.batched) if images]


def references(
    bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path, batches: Sequence[int] = ()
) -> list[Reference]:
    """Generate the pictures of each request, one request at a time, in a process that ends afterwards.

    Args:
        folder: receives the enrolled subjects.
        batches: batch sizes to generate each picture in as well.

    Raises:
        MomaError: the process failed or was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_generate_alone, bundle, backend, requests, folder, batches).result()
        except BrokenProcessPool:
            raise MomaError(
                "the process that generates the reference pictures was killed; there may be too little memory"
            ) from None


def subject_file(folder: Path, name: str) -> Path:
    """Return the path that one of `SUBJECTS` is saved to."""
    return folder / f"{SUBJECTS.index(name)}.subject"


def load_deterministic(bundle: Path, backend: str, **limits: int) -> Runtime:
    """Load a runtime whose pictures are bit-identical in every process that loads it this way."""
    runtime = Runtime.load(bundle, backend, **limits)
    if backend == "inductor":
        import torch

        # On a GPU this backend lets cuDNN time convolution algorithms: two processes may choose different ones, which
        # round differently. No network is loaded yet, so all are now chosen by rule, at a small cost in speed.
        torch.backends.cudnn.benchmark = False
    return runtime


def _generate_alone(
    bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path, batches: Sequence[int]
) -> list[Reference]:
    runtime = load_deterministic(bundle, backend)
    width = runtime.bundle.manifest.geometry.embedding_width
    subjects = {name: runtime.enroll(*photo_and_mask(name), name) for name in SUBJECTS}
    for name, subject in subjects.items():
        subject.save(subject_file(folder, name))

    def generated(request: PictureRequest, count: int) -> Images:
        options = {**request.options(width), "num_images": count}
        return [np.asarray(image) for image in runtime.generate(subjects[request.subject], **options).images]

    found = []
    for request in requests:
        singles = request.single()
        asked = generated(request, request.num_images)
        singly = asked if len(singles) == 1 else [generated(one, 1)[0] for one in singles]
        found.append(Reference(asked, singly, [[generated(one, count)[0] for one in singles] for count in batches]))
    return found
