"""The whole runtime on ONNX Runtime, with the bundle of the synthetic checkpoint."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest

from moma_rt.inputs.noise import Stream, draw
from moma_rt.inputs.tokenizers import text_prompt
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.pipeline.conditioning import Conditioner
from moma_rt.runtime import Runtime
from moma_rt.schedulers.tables import SCHEDULERS, Column, schedule
from moma_rt.subject import Prefix
from moma_rt.timing import StageTimer
from tests.moma_rt.batching import check_four_subjects, four_subjects

PROMPTS = (
    *(
        "A car on a beach.",
        "A car in autumn with falling leaves.",
        "a",
        "",
        ".",
        "..",
        ", a car",
        ": snow",
        "  two spaces",
    ),
    *("\nA line", "\t", "CAR", "car", "in", "in:", "A car, 4k, masterpiece", "自動車", "é", "🚗 at night", "a " * 60),
)

# For each scheduler, one that it might be confused with: DDIM's and Euler's tables differ only in the last row.
_OTHER = {"ddim": "euler", "euler": "ddim", "dpmpp_2m": "dpmpp_2m_karras", "dpmpp_2m_karras": "dpmpp_2m"}
_OTHER |= {"ddim_trailing": "ddim", "lcm": "tcd", "tcd": "lcm"}

MEMORY = """
import sys
from moma_rt import Runtime, Subject

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

runtime, subject = Runtime.load(sys.argv[1], "onnxruntime", threads=1), Subject.load(sys.argv[2])
for i in range(201):
    # Every tenth prompt is new and of another length: the language model and the caches take part.
    runtime.generate(subject, "A car." if i % 10 else "A car " + "and more " * (i // 20), steps=1, seed=i)
    if i == 0:
        start = resident()
print(resident() - start)
"""


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return Runtime.load(tiny_bundle, "onnxruntime", threads=2, max_batch=4)


@pytest.fixture(scope="module")
def car(tiny, goldens):
    return tiny.enroll(goldens / "context" / "image.png", goldens / "context" / "mask.png", "car")


def test_the_same_seed_gives_the_same_bytes_in_two_processes(tiny_bundle, goldens, tmp_path, repository):
    photo, mask = goldens / "context" / "image.png", goldens / "context" / "mask.png"

    def run(*arguments):
        command = [sys.executable, "-m", "moma_rt", *map(str, arguments), "--quiet"]
        subprocess.run(command, cwd=repository, check=True)

    for name in ("a", "b"):
        subject, out = tmp_path / f"{name}.subject", tmp_path / f"{name}.png"
        run("enroll", tiny_bundle, photo, mask, "--name", "car", "--seed", 3, "--out", subject)
        run("generate", tiny_bundle, subject, "A car in the snow.", "--steps", 3, "--seed", 7, "--out", out)
    assert (tmp_path / "a.subject").read_bytes() == (tmp_path / "b.subject").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_a_picture_depends_on(tiny, car, goldens):
    """A network that ignored one of its inputs would pass every comparison of a picture with itself."""
    mask = goldens / "context" / "mask.png"
    other = tiny.enroll(mask, mask, "car")
    first = np.asarray(tiny.generate(car, "A car.", steps=2).images[0])
    variants = {
        "prompt": tiny.generate(car, "Snow.", steps=2),
        "negative prompt": tiny.generate(car, "A car.", steps=2, negative_prompt="blurry"),
        "strength": tiny.generate(car, "A car.", steps=2, strength=0.2),
        "guidance": tiny.generate(car, "A car.", steps=2, guidance_scale=1.0),
        "seed": tiny.generate(car, "A car.", steps=2, seed=1),
        "photo": tiny.generate(other, "A car.", steps=2),
        "context": tiny.generate(car, "A car.", steps=2, context_embedding=np.ones(1024, np.float32)),
    }
    same = [name for name, result in variants.items() if np.array_equal(np.asarray(result.images[0]), first)]
    assert same == []


@pytest.fixture(scope="module")
def scheduled(tiny, car):
    """The result of a scheduler with a guidance scale, computed once."""

    @functools.cache
    def result(scheduler, guidance_scale):
        options = {"steps": 4, "seed": 2, "num_images": 2, "guidance_scale": guidance_scale}
        return tiny.generate(car, "A car.", scheduler=scheduler, **options)

    return result


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_makes_pictures_of_its_own(scheduled, name):
    result, other = (scheduled(s, 1.0 if name in ("lcm", "tcd") else 7.5) for s in (name, _OTHER[name]))
    assert result.images[0].tobytes() != result.images[1].tobytes()
    for image, others in zip(result.images, other.images, strict=True):
        assert np.asarray(image).std() > 1, "a picture without contrast"
        assert image.tobytes() != others.tobytes()


def test_a_mixed_interval_equals_a_loop_over_both_shapes(tiny, car):
    """Three steps, the second guided, each run on its own with inputs as in the networks' specs."""
    networks = tiny._networks
    conditioner, stages = Conditioner(networks, SubjectCache(networks, 1)), StageTimer()
    text, ids = conditioner.text_tokens(text_prompt("car", "A car."), stages)
    context = conditioner.context_tokens(car, "A car.", stages)
    conditions = {
        "text_tokens": [conditioner.text_tokens("blurry", stages)[0]] * 2 + [text] * 2,
        "context_tokens": [conditioner.unconditional_context_tokens(stages)] * 2 + [context] * 2,
    }
    shared = {name: np.stack([tensor] * 2) for name, tensor in car.inputs().items()}
    shared["subject_weights"] = np.stack([conditioner.text_tokenizer.subject_weights("car", ids)] * 2)
    shared["strength"] = np.ones(2, np.float32)
    grid = (networks.geometry.latent_size,) * 2
    state = {"latents": np.stack([draw(seed, Stream.INITIAL_LATENTS, (4, *grid)) for seed in (4, 5)])}
    state |= {"history": np.zeros_like(state["latents"]), "foreground_mask": np.ones((2, 1, *grid), np.float32)}
    shared["noise"] = np.zeros_like(state["latents"])
    for row, halves in zip(schedule("dpmpp_2m", 3, 7.5), (1, 2, 1), strict=True):
        row[Column.GUIDANCE] = 7.5 if halves == 2 else 1.0
        inputs = {name: np.stack(samples[-2 * halves :]) for name, samples in conditions.items()}
        outputs = networks.run("denoiser", {**shared, **state, **inputs, "schedule_row": row}, stages)
        state = {name: outputs[f"next_{name}"] for name in state}
    options = {"seed": 4, "num_images": 2, "negative_prompt": "blurry", "scheduler": "dpmpp_2m"}
    result = tiny.generate(car, "A car.", steps=3, guidance_interval=(400, 600), **options)
    images = networks.run("vae_decoder", {"latents": state["latents"]}, stages)["image"]
    np.testing.assert_array_equal(np.stack(result.images), images)
    masks = state["foreground_mask"][:, 0].repeat(8, 1).repeat(8, 2)
    np.testing.assert_array_equal(result.foreground_masks, masks)
    always = tiny.generate(car, "A car.", steps=3, **options)
    assert np.abs(np.stack(always.images).astype(int) - images).max() > 1, "the interval must matter"


def test_prefix_and_suffix_give_the_context_of_the_full_pass(tiny, car):
    networks = tiny._networks
    conditioner, stages = Conditioner(networks, SubjectCache(networks, 1)), StageTimer()
    language, prefix = networks.geometry.language, car.prefix
    pixels = np.random.default_rng(0).standard_normal((1, 3, *[language.vision_image_size] * 2), dtype=np.float32)
    image_tokens = networks.run("vision_encoder", {"pixels": pixels}, stages)["image_tokens"]
    subject = dataclasses.replace(car, prefix=conditioner.prefix("car", pixels, stages))
    # If a prompt's first token merges with the prefix's last ones, fewer are reused.
    shorter = Prefix(np.append(prefix.ids[:-3], [5, 6, 7]).astype(np.int32), subject.prefix.kv.copy())
    shorter.kv[:, :, :, -3:] = np.nan
    merged = dataclasses.replace(subject, prefix=shorter, photo=255 - subject.photo)
    for prompt in PROMPTS:
        ids = conditioner.language_tokenizer.encode("car", prompt, language.vocabulary, language.image_tokens)
        inputs = {
            "token_ids": ids[None],
            "image_tokens": image_tokens,
            "positions": np.arange(len(ids), dtype=np.int32)[None],
            "past_kv": np.zeros((language.layers, 2, language.kv_heads, 0, language.head_width), np.float32),
        }
        full = conditioner.project(networks.run("language_model", inputs, stages)["embedding"][0], stages)
        for reused in (subject, merged):
            np.testing.assert_allclose(conditioner.context_tokens(reused, prompt, stages), full, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_200_generations_leak_no_memory(tiny_bundle, car, tmp_path, repository):
    car.save(tmp_path / "car.subject")
    command = [sys.executable, "-c", MEMORY, str(tiny_bundle), str(tmp_path / "car.subject")]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 5e6


def test_a_batch_of_four_subjects_equals_single_requests(tiny, photo, mask):
    check_four_subjects(tiny, four_subjects(tiny, photo, mask))
