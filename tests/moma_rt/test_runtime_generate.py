"""Generation, with fake networks."""

import asyncio
import dataclasses
import functools
import threading
import warnings
from concurrent.futures import Future

import numpy as np
import pytest

from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import BundleError, Cancelled, InputError, MomaWarning
from moma_rt.inputs.noise import Stream, draw
from moma_rt.runtime import Runtime
from moma_rt.schedulers.tables import Column, schedule
from tests.moma_rt.waiting import wait_until


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def test_the_loop_runs_one_schedule_row_per_step_and_passes_the_state_on(runtime, backend, subject):
    result = runtime.generate(subject, "A car.", steps=4, seed=3)
    steps = backend.inputs_of("denoiser")
    np.testing.assert_array_equal(np.stack([s["schedule_row"] for s in steps]), schedule("ddim", 4, 7.5))
    np.testing.assert_array_equal(steps[0]["latents"][0], draw(3, Stream.INITIAL_LATENTS, (4, 8, 8)))
    assert (steps[0]["foreground_mask"] == 1).all()
    assert not steps[0]["history"].any()
    assert not any(s["noise"].any() for s in steps)
    assert not np.array_equal(steps[0]["latents"], steps[1]["latents"])
    assert not (steps[1]["foreground_mask"] == 1).any()
    assert result.seeds == [3]
    assert result.images[0].size == (64, 64)
    assert result.images[0].mode == "RGB"


def test_the_result_is_the_last_step_whether_steps_are_even_or_odd(runtime, backend, subject, fakes):
    for steps in (1, 2, 3):
        backend.runs.clear()
        result = runtime.generate(subject, "A car.", steps=steps)
        last = fakes.functions["denoiser"](backend.inputs_of("denoiser")[-1])
        image = fakes.functions["vae_decoder"]({"latents": last["next_latents"].astype(np.float32)})["image"]
        np.testing.assert_array_equal(pixels(result), image)
        mask = last["next_foreground_mask"].astype(np.float32)[0, 0].repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(result.foreground_masks[0], mask)
        assert result.foreground_masks[0].dtype == np.float32


def test_the_unconditional_half_comes_first(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=1, num_images=2, negative_prompt="blurry")
    (step,) = backend.inputs_of("denoiser")
    runtime.generate(subject, "A car.", steps=1, num_images=2, negative_prompt="ugly")
    other = backend.inputs_of("denoiser")[1]
    assert step["text_tokens"].shape == (4, 77, 6)
    np.testing.assert_array_equal(step["text_tokens"][0], step["text_tokens"][1])
    np.testing.assert_array_equal(step["text_tokens"][2], step["text_tokens"][3])
    assert not np.array_equal(step["text_tokens"][:2], other["text_tokens"][:2])
    np.testing.assert_array_equal(step["text_tokens"][2:], other["text_tokens"][2:])
    assert (step["context_tokens"][:2] == 0.5).all(), "the projection of zeros, not zeros"
    assert not (step["context_tokens"][2:] == 0.5).any()


def test_no_guidance_computes_only_the_conditional_half(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=2, guidance_scale=1.0)
    first, second = backend.inputs_of("denoiser")
    for step in (first, second):
        assert step["text_tokens"].shape == (1, 77, 6)
        assert step["context_tokens"].shape == (1, 4, 6)
    assert len(backend.inputs_of("text_encoder")) == 1, "the negative prompt is not encoded"
    assert len(backend.inputs_of("context_projector")) == 1, "no unconditional context either"
    guided = runtime.generate(subject, "A car.", steps=2, guidance_scale=1.001)
    unguided = runtime.generate(subject, "A car.", steps=2, guidance_scale=1.0)
    assert np.abs(pixels(guided).astype(int) - pixels(unguided)).max() <= 2


def test_subject_weights_mark_every_occurrence_of_the_name(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=1)
    weights = backend.inputs_of("denoiser")[0]["subject_weights"][0]
    ids = backend.inputs_of("text_encoder")[0]["token_ids"][0]
    assert weights.sum() == 2
    assert len(set(ids[weights == 1])) == 1


def test_prefix_and_suffix_give_what_the_whole_sequence_gives(runtime, backend, subject, fakes):
    runtime.generate(subject, "A car on a beach.", steps=1)
    (suffix,) = backend.inputs_of("language_model")
    past, ids = suffix["past_kv"].shape[3], suffix["token_ids"][0]
    assert past == len(subject.prefix.ids), "all of the prefix: no token of this tokenizer crosses the boundary"
    np.testing.assert_array_equal(suffix["positions"][0], past + np.arange(len(ids)))
    assert suffix["image_tokens"].shape == (1, 1, 5)
    assert not suffix["image_tokens"].any()
    projected = backend.inputs_of("context_projector")[0]["embedding"]
    np.testing.assert_array_equal(projected, fakes.functions["language_model"](suffix)["embedding"].astype(np.float32))


def test_a_prefix_that_ends_differently_is_used_up_to_there(runtime, backend, subject):
    whole = runtime.generate(subject, "A car.", steps=1)
    expected = backend.inputs_of("context_projector")[0]["embedding"]
    prefix = subject.prefix
    ids, kv = prefix.ids.copy(), prefix.kv.copy()
    ids[-2:] = 7
    kv[:, :, :, -2:] = np.nan
    merged = dataclasses.replace(subject, prefix=dataclasses.replace(prefix, ids=ids, kv=kv), name="car")
    backend.runs.clear()
    result = runtime.generate(merged, "A car.", steps=1)
    (suffix,) = backend.inputs_of("language_model")
    assert suffix["past_kv"].shape[3] == len(ids) - 2
    np.testing.assert_allclose(backend.inputs_of("context_projector")[0]["embedding"], expected, atol=1e-5)
    assert np.abs(pixels(result).astype(int) - pixels(whole)).max() <= 1


def test_texts_and_contexts_are_computed_once(runtime, backend, subject, photo, mask):
    first = runtime.generate(subject, "A car.", steps=1)
    backend.runs.clear()
    again = runtime.generate(subject, "A car.", steps=1)
    assert [name for name, _ in backend.runs] == ["denoiser", "vae_decoder"]
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert set(again.seconds) == {"denoiser", "vae_decoder"}
    backend.runs.clear()
    runtime.generate(subject, "A red car.", steps=1)
    assert [name for name, _ in backend.runs] == [
        "text_encoder",
        "language_model",
        "context_projector",
        "denoiser",
        "vae_decoder",
    ]
    other = runtime.enroll(photo.rotate(90), mask, "car")
    backend.runs.clear()
    runtime.generate(other, "A car.", steps=1)
    assert [name for name, _ in backend.runs][:2] == ["language_model", "context_projector"], (
        "another subject's context"
    )


def test_a_cut_prompt_warns_every_time(runtime, subject):
    for _ in range(2):
        with pytest.warns(MomaWarning, match="cut: 'zz"):
            runtime.generate(subject, "A car." + " " * 60 + "z" * 40, steps=1)


def test_a_warning_names_the_line_that_called_the_runtime(runtime, subject):
    """Python's default filter shows a warning once per line; one located in the runtime would reach one caller only."""
    prompt = "A car." + "z" * 99
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        runtime.generate(subject, prompt, steps=1)
        runtime.generate(subject, prompt, steps=1)
        assert [warning.filename for warning in caught] == [__file__] * 2
        assert caught[1].lineno == caught[0].lineno + 1


def test_buffers_are_allocated_and_bound_once_per_size(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=2)
    backend.allocations.clear()
    backend.binds.clear()
    for seed in range(5):
        runtime.generate(subject, "A car.", steps=3, seed=seed, strength=0.1 * seed)
    assert backend.allocations == []
    assert backend.binds == []
    runtime.generate(subject, "A car.", steps=2, num_images=2)
    assert backend.binds == ["denoiser", "denoiser", "vae_decoder", "vae_decoder"]


def test_reused_buffers_hold_the_subject_of_this_call(runtime, backend, subject, photo, mask):
    other = runtime.enroll(photo.rotate(180), mask, "car")
    assert other.token_counts() == subject.token_counts(), "else they do not share buffers"
    for wanted in (subject, other, subject):
        backend.runs.clear()
        runtime.generate(wanted, "A car.", steps=1, num_images=2)
        (step,) = backend.inputs_of("denoiser")
        for name, tensor in wanted.inputs().items():
            np.testing.assert_array_equal(step[name], np.stack([tensor, tensor]))


def test_the_same_subject_is_uploaded_once(runtime, backend, subject):
    runtime.generate(subject, "A car.", steps=1)
    backend.uploads.clear()
    runtime.generate(subject, "A car.", steps=1)
    reference = subject.reference_k["down_blocks.0.attentions.0"]
    assert backend.uploads
    assert reference.shape not in backend.uploads


def test_solver_history_is_reset_between_calls(runtime, backend, subject, monkeypatch):
    rows = schedule("ddim", 3, 7.5)
    rows[:, Column.HISTORY_EPS] = rows[1:, Column.HISTORY] = 1.0
    monkeypatch.setattr("moma_rt.pipeline.request.schedule", lambda *_: rows)
    for _ in range(2):
        backend.runs.clear()
        runtime.generate(subject, "A car.", steps=3)
        histories = [inputs["history"] for inputs in backend.inputs_of("denoiser")]
        assert not histories[0].any()
        assert histories[1].any()
        assert histories[2].any()


def test_several_images_equal_single_runs_with_consecutive_seeds(runtime, backend, subject, fakes):
    together = runtime.generate(subject, "A car.", steps=2, seed=10, num_images=6)
    assert together.seeds == [10, 11, 12, 13, 14, 15]
    batches = [len(inputs["latents"]) for inputs in backend.inputs_of("denoiser")]
    assert batches == [fakes.max_batch] * 2 + [2] * 2
    assert len(together.foreground_masks) == 6
    for i, seed in enumerate(together.seeds):
        alone = runtime.generate(subject, "A car.", steps=2, seed=seed)
        assert np.abs(pixels(alone)[0].astype(int) - pixels(together)[i]).max() <= 1
        np.testing.assert_allclose(alone.foreground_masks[0], together.foreground_masks[i], atol=1e-5)
    assert len(np.unique(pixels(together), axis=0)) == 6


def test_given_latents_are_used_instead_of_the_seed(runtime, backend, subject):
    latents = np.random.default_rng(0).standard_normal((6, 4, 8, 8))
    runtime.generate(subject, "A car.", steps=1, num_images=6, latents=latents)
    used = np.concatenate([inputs["latents"] for inputs in backend.inputs_of("denoiser")])
    np.testing.assert_array_equal(used, latents.astype(np.float32))


def test_a_context_embedding_needs_no_language_model(tmp_path, fakes, backend, photo, mask):
    bundle = fakes.make_bundle(tmp_path, without=("language_model", "vision_encoder"))
    runtime = Runtime(Bundle.open(bundle), backend)
    subject = runtime.enroll(photo, mask, "car")
    embedding = np.linspace(-1, 1, 16)
    runtime.generate(subject, "A car.", steps=1, context_embedding=embedding)
    np.testing.assert_array_equal(
        backend.inputs_of("context_projector")[0]["embedding"][0], embedding.astype(np.float32)
    )
    with pytest.raises(BundleError, match="no language_model network: give context_embedding"):
        runtime.generate(subject, "A car.", steps=1)


def test_the_context_embedding_is_what_a_prompt_uses(runtime, subject, photo, mask):
    embedding = runtime.context_embedding(subject, "A car.")
    assert (embedding.shape, embedding.dtype) == ((16,), np.float32)
    given = runtime.generate(subject, "A car.", steps=1, context_embedding=embedding)
    np.testing.assert_array_equal(pixels(given), pixels(runtime.generate(subject, "A car.", steps=1)))
    assert np.abs(embedding - runtime.context_embedding(subject, "A bus.")).max() > 1e-3
    other = runtime.enroll(photo.rotate(180), mask, "car")
    assert np.abs(embedding - runtime.context_embedding(other, "A car.")).max() > 1e-3


def test_a_scheduler_that_adds_noise_draws_it_from_each_seed(runtime, backend, subject, monkeypatch):
    rows = schedule("ddim", 3, 7.5)
    rows[:, Column.NOISE] = 0.1
    monkeypatch.setattr("moma_rt.pipeline.request.schedule", lambda *_: rows)
    runtime.generate(subject, "A car.", steps=3, seed=4, num_images=2)
    used = np.stack([inputs["noise"] for inputs in backend.inputs_of("denoiser")])
    for i, seed in enumerate((4, 5)):
        np.testing.assert_array_equal(used[:, i], draw(seed, Stream.STEP, (3, 4, 8, 8)))
    monkeypatch.undo()
    runtime.generate(subject, "A car.", steps=1, num_images=2)
    assert not backend.inputs_of("denoiser")[-1]["noise"].any(), "left over from the call before"


def test_each_step_is_reported(runtime, subject):
    infos = []
    runtime.generate(subject, "A car.", steps=2, num_images=5, on_step=infos.append)
    assert [(i.step, i.steps) for i in infos] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [i.timestep for i in infos] == [501, 1, 501, 1]


class TorchFalse:
    """As much of a PyTorch tensor as is looked at."""

    dtype, ndim = "torch.bool", 0

    def __bool__(self):
        return False


@pytest.mark.parametrize("value", [False, np.False_, np.float32(1) < 0, np.array(False), TorchFalse()])
def test_any_librarys_false_cancels(runtime, subject, value):
    with pytest.raises(Cancelled, match="after step 1 of 4"):
        runtime.generate(subject, "A car.", steps=4, on_step=lambda _: value)


@pytest.mark.parametrize("value", [None, True, np.True_, 0, 0.0, "", [], np.zeros(3, bool), np.float32(0)])
def test_other_values_of_a_callback_mean_nothing(runtime, subject, value):
    assert runtime.generate(subject, "A car.", steps=2, on_step=lambda _: value).images


@pytest.mark.filterwarnings("error")
def test_a_callback_whose_work_nobody_would_do_is_an_error(runtime, subject):
    async def hear(info):
        return False

    def steps(info):
        yield info.step

    for callback, name in ((hear, "coroutine"), (steps, "generator"), (lambda _: Future(), "Future")):
        with pytest.raises(InputError, match=f"on_step returned a {name}: give a function that does its work at once"):
            runtime.generate(subject, "A car.", steps=2, on_step=lambda info, callback=callback: callback(info))

    @functools.wraps(hear)
    def run(info):
        return asyncio.run(hear(info))

    with pytest.raises(Cancelled):
        runtime.generate(subject, "A car.", steps=2, on_step=run)
    assert runtime.generate(subject, "A car.", steps=2).images


def test_cancelling_ends_at_once_and_leaves_the_runtime_usable(runtime, backend, subject):
    expected = runtime.generate(subject, "A car.", steps=4)
    backend.runs.clear()
    with pytest.raises(Cancelled, match="after step 3 of 4"):
        runtime.generate(subject, "A car.", steps=4, on_step=lambda info: info.step < 3)
    assert len(backend.runs) == 3
    np.testing.assert_array_equal(pixels(runtime.generate(subject, "A car.", steps=4)), pixels(expected))


def test_a_callback_that_raises_leaves_the_runtime_usable(runtime, subject):
    def fail(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        runtime.generate(subject, "A car.", steps=4, on_step=fail)
    assert runtime.generate(subject, "A car.", steps=1).images


@pytest.mark.parametrize("within", ["generate", "enroll"])
def test_calling_the_runtime_from_its_callback_is_refused(runtime, subject, photo, mask, within):
    def call_again(_):
        if within == "generate":
            runtime.generate(subject, "A car.", steps=1)
        else:
            runtime.enroll(photo, mask, "car")

    with pytest.raises(InputError, match="called from on_step") as caught:
        runtime.generate(subject, "A car.", steps=1, on_step=call_again)
    assert "\n" not in str(caught.value)
    assert runtime.generate(subject, "A car.", steps=1).images, "the queue was released"


def test_threads_use_the_backend_one_at_a_time(runtime, backend, subject, fakes, monkeypatch):
    expected = [pixels(runtime.generate(subject, "A car.", steps=3, seed=seed)) for seed in range(2)]
    found, inside, denoiser = {}, threading.Event(), fakes.functions["denoiser"]

    def lingering(inputs):
        # The first thread stays in the backend until the second one waits in the queue, or wrongly enters the backend.
        if not inside.is_set():
            inside.set()
            wait_until(lambda: backend.collided.is_set() or bool(runtime._queue._waiting))
        return denoiser(inputs)

    def work(seed):
        found[seed] = pixels(runtime.generate(subject, "A car.", steps=3, seed=seed))

    monkeypatch.setitem(fakes.functions, "denoiser", lingering)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert found.keys() == {0, 1}, "a thread failed"
    assert not backend.collided.is_set()
    for seed, picture in found.items():
        np.testing.assert_array_equal(picture, expected[seed])


def test_networks_are_loaded_when_needed_and_once(runtime, backend, photo, mask):
    assert backend.loads == []
    subject = runtime.enroll(photo, mask, "car")
    assert "denoiser" not in backend.loads
    for _ in range(2):
        runtime.generate(subject, "A car.", steps=1)
    assert len(backend.loads) == len(set(backend.loads)) == 8
