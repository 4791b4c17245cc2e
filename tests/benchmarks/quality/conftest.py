"""The evaluation's subjects and judge, and renders in the place of generated pictures."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from benchmarks.quality.cases import CONTEXT, Ablation, Case, Setup
from benchmarks.quality.generation import Made
from benchmarks.quality.judge import Judge
from benchmarks.quality.scorers.scorer import Scorers
from benchmarks.quality.subjects import load_subjects
from examples.mini_moma.backgrounds import STUDIO
from examples.mini_moma.icons import Icon
from examples.mini_moma.scenes import target, textured

GRID = 16


@pytest.fixture(scope="session")
def subjects() -> tuple[Icon, ...]:
    return load_subjects()


@pytest.fixture(scope="session")
def judge(subjects) -> Judge:
    return Judge(Scorers(), subjects)


@pytest.fixture(scope="session")
def rendered(subjects) -> Callable[[Sequence[Case], Setup, Ablation], list[Made]]:
    """Makes what a perfect model would."""

    def make(cases: Sequence[Case], setup: Setup, ablation: Ablation) -> list[Made]:
        made = []
        for case in cases:
            rng, rgba = np.random.default_rng(case.seed), subjects[case.subject].rgba_hwc
            if case.kind == CONTEXT:
                scene = target(rgba, case.key, rng)
            else:
                scene = target(textured(rgba, case.key, rng), STUDIO, rng)
            cell = scene.mask_hw.shape[0] // GRID
            coverage = scene.mask_hw.reshape(GRID, cell, GRID, cell).mean((1, 3))
            made.append(Made(scene.picture_hwc, coverage.astype(np.float32)))
        return made

    return make
