"""Makes the evaluation's pictures with the runtime."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.quality.cases import Ablation, Case, Setup
from benchmarks.quality.subjects import photo_of
from examples.mini_moma.icons import Icon
from moma_rt.memory.lru import Lru
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject

# The subject at hand, the one whose photo replaces its own, and that one under its own name.
_KEPT_SUBJECTS = 3


@dataclass(frozen=True, eq=False)
class Made:
    """A generated picture, uint8 [H, W, RGB], and its last foreground mask, float32 [g, g] on the latents' grid."""

    picture_hwc: npt.NDArray[np.uint8]
    foreground_gg: npt.NDArray[np.float32]


class Maker:
    """Makes pictures of the evaluation's subjects.

    Args:
        max_batch: that of the runtime: so many calls wait for the device at a time, and share a batch.
    """

    def __init__(self, runtime: Runtime, subjects: Sequence[Icon], max_batch: int = 1) -> None:
        self._runtime, self._subjects, self._max_batch = runtime, subjects, max_batch
        self._enrolled: Lru[tuple[int, str], Subject] = Lru(_KEPT_SUBJECTS)

    def make(self, cases: Sequence[Case], setup: Setup, ablation: Ablation) -> list[Made]:
        """Make the pictures of cases, in their order.

        Raises:
            MomaError: the bundle cannot make them; as for `Runtime.generate`.
        """
        calls = [self._call(case, setup, ablation) for case in cases]
        with ThreadPoolExecutor(self._max_batch) as threads:
            return list(threads.map(lambda call: self._made(*call), calls))

    def _call(self, case: Case, setup: Setup, ablation: Ablation) -> tuple[Subject, Case, dict[str, object]]:
        other = (case.subject + 1) % len(self._subjects)
        subject = self._subject(other if ablation.other_reference else case.subject, case.name)
        prompt = "" if ablation.empty_prompt else case.prompt
        embedding = None
        if ablation.other_embedding:
            name = self._subjects[other].name
            embedding = self._runtime.context_embedding(self._subject(other, name), case.prompt_for(name))
        elif ablation.other_reference:
            embedding = self._runtime.context_embedding(self._subject(case.subject, case.name), prompt)
        options = {
            "prompt": prompt,
            "strength": 0.0 if ablation.no_reference else setup.strength_of(case),
            "steps": setup.steps,
            "guidance_scale": setup.guidance_scale,
            "scheduler": setup.scheduler,
            "seed": case.seed,
            "context_embedding": embedding,
        }
        return subject, case, options

    def _made(self, subject: Subject, case: Case, options: dict[str, object]) -> Made:
        result = self._runtime.generate(subject, **options)  # type: ignore[arg-type]
        mask = result.foreground_masks[0]
        cell = mask.shape[0] // self._runtime.bundle.manifest.geometry.latent_size
        return Made(np.asarray(result.images[0]), mask[::cell, ::cell])

    def _subject(self, index: int, name: str) -> Subject:
        def enroll() -> Subject:
            scene = photo_of(self._subjects, index)
            return self._runtime.enroll(Image.fromarray(scene.picture_hwc), Image.fromarray(scene.mask_hw), name)

        return self._enrolled.get_or_make((index, name), enroll)
