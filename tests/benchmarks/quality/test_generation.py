"""What each ablation asks the runtime for."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.cases import ABLATIONS, FULL, Ablation, Setup, cases
from benchmarks.quality.generation import Maker
from benchmarks.quality.subjects import photo_of


class FakeRuntime:
    """Records calls; an enrolled subject is its photo and its name, an embedding is a text."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[bytes, str], dict]] = []
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(geometry=SimpleNamespace(latent_size=16)))

    def enroll(self, image: Image.Image, mask: Image.Image, name: str) -> tuple[bytes, str]:
        assert mask.mode == "1"
        return image.tobytes(), name

    def context_embedding(self, subject: tuple[bytes, str], prompt: str) -> tuple:
        return (*subject, prompt)

    def generate(self, subject: tuple[bytes, str], **options: object) -> SimpleNamespace:
        self.calls.append((subject, options))
        mask = np.kron(np.arange(256, dtype=np.float32).reshape(16, 16), np.ones((8, 8), np.float32))
        return SimpleNamespace(images=[Image.new("RGB", (128, 128))], foreground_masks=[mask])


@pytest.fixture
def make(subjects):
    """Makes a picture of subject 49, whose next one is 0; returns the call."""

    def call(ablation: Ablation) -> tuple[tuple[bytes, str], dict]:
        runtime = FakeRuntime()
        (made,) = Maker(runtime, subjects).make(
            cases(49, subjects[49].name, ("beach",), ()), Setup(steps=7, scheduler="euler"), ablation
        )
        np.testing.assert_array_equal(made.foreground_gg.ravel(), np.arange(256))
        return runtime.calls[0]

    return call


def test_the_full_model_and_each_ablation(make, subjects):
    photos = {index: photo_of(subjects, index).picture_hwc.tobytes() for index in (49, 0)}
    own, first = subjects[49].name, subjects[0].name
    prompt, of_first = f"An {own} on the beach.", f"A {first} on the beach."
    subject, options = make(FULL)
    assert subject == (photos[49], own)
    assert options == {
        "prompt": prompt,
        "strength": 1.0,
        "steps": 7,
        "guidance_scale": 7.5,
        "scheduler": "euler",
        "seed": 4900,
        "context_embedding": None,
    }
    assert make(ABLATIONS["no_reference"]) == (subject, options | {"strength": 0.0})
    assert make(ABLATIONS["empty_prompt"]) == (subject, options | {"prompt": ""})
    embeddings = {"own": (photos[49], own, prompt), "other": (photos[0], first, of_first)}
    other = (photos[0], own)
    assert make(ABLATIONS["other_reference"]) == (other, options | {"context_embedding": embeddings["own"]})
    assert make(ABLATIONS["other_photo"]) == (other, options | {"context_embedding": embeddings["other"]})
    assert make(ABLATIONS["other_embedding"]) == (subject, options | {"context_embedding": embeddings["other"]})
    assert make(ABLATIONS["only_other_embedding"]) == (
        subject,
        options | {"context_embedding": embeddings["other"], "strength": 0.0},
    )


def test_pictures_come_in_the_order_of_their_cases(subjects):
    runtime = FakeRuntime()
    asked = cases(2, subjects[2].name, ("beach", "night", "space"), ("gold",))
    runtime.generate = lambda subject, seed, **_: SimpleNamespace(  # type: ignore[method-assign]
        images=[Image.new("RGB", (128, 128), (seed % 256,) * 3)], foreground_masks=[np.zeros((128, 128), np.float32)]
    )
    made = Maker(runtime, subjects, max_batch=4).make(asked, Setup(), FULL)
    assert [one.picture_hwc[0, 0, 0] for one in made] == [case.seed % 256 for case in asked]
