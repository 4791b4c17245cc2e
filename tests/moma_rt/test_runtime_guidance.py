"""Guidance in an interval of timesteps: which steps compute the unconditional half, with fake networks."""

import numpy as np
import pytest

from moma_rt.errors import Cancelled
from moma_rt.inputs.noise import Stream, draw
from moma_rt.schedulers.tables import Column, schedule

# Five steps have the timesteps 801, 601, 401, 201, 1; the interval has the second and third.
MIXED, GUIDED = (400, 700), [False, True, True, False, False]


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def assert_same(result, expected):
    np.testing.assert_array_equal(pixels(result), pixels(expected))
    np.testing.assert_array_equal(result.foreground_masks, expected.foreground_masks)


def generate(runtime, backend, subject, **options):
    """The result of five steps and the inputs of every run of the denoiser."""
    backend.runs.clear()
    result = runtime.generate(subject, "A car.", steps=5, **options)
    return result, backend.inputs_of("denoiser")


def assert_same_runs(runs, expected):
    for inputs, wanted in zip(runs, expected, strict=True):
        assert inputs.keys() == wanted.keys()
        for name in inputs:
            np.testing.assert_array_equal(inputs[name], wanted[name])


@pytest.mark.parametrize("interval", [(0, 999), (1, 801), [0.5, 801.5], (np.int64(1), np.float32(900))])
def test_an_interval_with_all_steps_changes_nothing(runtime, backend, subject, interval):
    expected, wanted = generate(runtime, backend, subject, num_images=2)
    backend.allocations.clear()
    result, runs = generate(runtime, backend, subject, num_images=2, guidance_interval=interval)
    assert_same(result, expected)
    assert_same_runs(runs, wanted)
    assert backend.allocations == [], "the same buffers"


@pytest.mark.parametrize("interval", [(0, 0), (402, 600), (802, 999)])
def test_an_interval_without_steps_is_no_guidance(runtime, backend, subject, interval):
    result, runs = generate(runtime, backend, subject, num_images=2, guidance_interval=interval)
    assert len(backend.inputs_of("text_encoder")) == 1, "the negative prompt is not encoded"
    backend.allocations.clear()
    expected, wanted = generate(runtime, backend, subject, num_images=2, guidance_scale=1.0)
    assert_same(result, expected)
    assert_same_runs(runs, wanted)
    assert backend.allocations == [], "the same buffers"


def test_without_guidance_the_interval_changes_nothing(runtime, backend, subject):
    expected, wanted = generate(runtime, backend, subject, guidance_scale=1.0)
    result, runs = generate(runtime, backend, subject, guidance_scale=1.0, guidance_interval=MIXED)
    assert_same(result, expected)
    assert_same_runs(runs, wanted)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m_karras", "tcd"])
def test_a_mixed_interval_equals_a_loop_over_both_shapes(runtime, backend, subject, fakes, scheduler):
    denoiser, decoder = fakes.functions["denoiser"], fakes.functions["vae_decoder"]
    options = {"num_images": 3, "seed": 5, "negative_prompt": "blurry", "scheduler": scheduler}
    _, (guided, *_) = generate(runtime, backend, subject, **options)
    _, (unguided, *_) = generate(runtime, backend, subject, guidance_scale=1.0, **options)
    rows = schedule(scheduler, 5, 7.5)
    inside = (rows[:, Column.TIMESTEP] >= MIXED[0]) & (rows[:, Column.TIMESTEP] <= MIXED[1])
    assert 0 < inside.sum() < 5
    noise = np.stack([draw(seed, Stream.STEP, (5, 4, 8, 8)) for seed in (5, 6, 7)], axis=1)
    state = {name: guided[name] for name in ("latents", "history", "foreground_mask")}
    for index, row in enumerate(rows):
        inputs = guided if inside[index] else unguided
        z = noise[index] if rows[:, Column.NOISE].any() else np.zeros_like(noise[index])
        row[Column.GUIDANCE] = 7.5 if inside[index] else 1.0
        outputs = denoiser({**inputs, **state, "schedule_row": row, "noise": z})
        state = {name: outputs[f"next_{name}"].astype(np.float32) for name in state}
    result, runs = generate(runtime, backend, subject, guidance_interval=MIXED, **options)
    assert [len(run["text_tokens"]) for run in runs] == [6 if guided else 3 for guided in inside]
    np.testing.assert_array_equal(pixels(result), decoder({"latents": state["latents"]})["image"])
    masks = state["foreground_mask"][:, 0].repeat(8, 1).repeat(8, 2)
    np.testing.assert_array_equal(result.foreground_masks, masks)


def test_a_guided_step_has_the_unconditional_half_first_and_others_only_the_conditional(runtime, backend, subject):
    _, runs = generate(runtime, backend, subject, num_images=2, negative_prompt="blurry", guidance_interval=MIXED)
    assert [len(run["text_tokens"]) == 4 for run in runs] == GUIDED
    for name in ("text_tokens", "context_tokens"):
        both, one = runs[1][name], runs[0][name]
        np.testing.assert_array_equal(both[2:], one)
        np.testing.assert_array_equal(both[0], both[1])
        assert not np.array_equal(both[:2], one)


def test_the_interval_applies_to_every_batch(runtime, backend, subject, fakes):
    together, runs = generate(runtime, backend, subject, num_images=6, seed=10, guidance_interval=MIXED)
    sizes = [(fakes.max_batch, guided) for guided in GUIDED] + [(2, guided) for guided in GUIDED]
    assert [len(run["text_tokens"]) for run in runs] == [batch * (2 if guided else 1) for batch, guided in sizes]
    for i, seed in enumerate(together.seeds):
        alone, _ = generate(runtime, backend, subject, seed=seed, guidance_interval=MIXED)
        assert np.abs(pixels(alone)[0].astype(int) - pixels(together)[i]).max() <= 1


def test_both_shapes_are_allocated_and_bound_once_and_share_all_but_the_conditions(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=1, num_images=2)
    backend.allocations.clear()
    generate(runtime, backend, subject)
    always = backend.allocations.copy()
    backend.allocations.clear()
    backend.binds.clear()
    generate(runtime, backend, subject, guidance_interval=MIXED)
    assert sorted(backend.allocations) == sorted([*always, (1, 77, 6), (1, 4, 6)])
    assert backend.binds == ["denoiser"] * 4 + ["vae_decoder"] * 2
    backend.allocations.clear()
    backend.binds.clear()
    for interval in (MIXED, (0, 300), (801, 999)):
        generate(runtime, backend, subject, guidance_interval=interval)
    assert backend.allocations == []
    assert backend.binds == []


def test_each_step_is_reported(runtime, subject):
    infos = []
    runtime.generate(subject, "A car.", steps=5, num_images=5, guidance_interval=MIXED, on_step=infos.append)
    assert [(i.step, i.steps) for i in infos] == [(n, 10) for n in range(1, 11)]
    assert [i.timestep for i in infos] == [801, 601, 401, 201, 1] * 2


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_cancelling_among_mixed_steps_leaves_the_runtime_usable(runtime, backend, subject, last):
    expected, _ = generate(runtime, backend, subject, guidance_interval=MIXED)
    backend.runs.clear()
    with pytest.raises(Cancelled, match=f"after step {last} of 5"):
        generate(runtime, backend, subject, guidance_interval=MIXED, on_step=lambda info: info.step < last)
    assert len(backend.inputs_of("denoiser")) == last
    assert_same(generate(runtime, backend, subject, guidance_interval=MIXED)[0], expected)
