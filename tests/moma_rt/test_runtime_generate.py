"""Generating, with networks of NumPy."""

import dataclasses
import math
import threading
import warnings

import numpy as np
import pytest

from moma_rt.bundle import Bundle
from moma_rt.errors import BundleError, Cancelled, InputError, MomaError, MomaWarning, SubjectError
from moma_rt.noise import Stream, draw
from moma_rt.runtime import Runtime
from moma_rt.schedules import Column, schedule


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def test_the_loop_runs_one_row_a_step_and_hands_the_state_on(runtime, backend, subject):
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


def test_subject_words_weigh_wherever_they_occur(runtime, backend, subject):
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
    """Python's default filter shows a warning once a place, so one placed in here would be shown to one caller only."""
    prompt = "A car." + "z" * 99
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        runtime.generate(subject, prompt, steps=1)
        runtime.generate(subject, prompt, steps=1)
        assert [warning.filename for warning in caught] == [__file__] * 2
        assert caught[1].lineno == caught[0].lineno + 1


def test_buffers_are_allocated_and_bound_once_a_size(runtime, backend, subject):
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
    assert (1, *reference.shape) not in backend.uploads


def test_the_history_of_the_call_before_is_forgotten(runtime, backend, subject, monkeypatch):
    rows = schedule("ddim", 3, 7.5)
    rows[:, Column.HISTORY_EPS] = rows[1:, Column.HISTORY] = 1.0
    monkeypatch.setattr("moma_rt.generation.schedule", lambda *_: rows)
    for _ in range(2):
        backend.runs.clear()
        runtime.generate(subject, "A car.", steps=3)
        histories = [inputs["history"] for inputs in backend.inputs_of("denoiser")]
        assert not histories[0].any()
        assert histories[1].any()
        assert histories[2].any()


def test_several_images_are_what_single_runs_with_following_seeds_are(runtime, backend, subject, fakes):
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


def test_a_scheduler_that_adds_noise_gets_each_seeds_own(runtime, backend, subject, monkeypatch):
    rows = schedule("ddim", 3, 7.5)
    rows[:, Column.NOISE] = 0.1
    monkeypatch.setattr("moma_rt.generation.schedule", lambda *_: rows)
    runtime.generate(subject, "A car.", steps=3, seed=4, num_images=2)
    used = np.stack([inputs["noise"] for inputs in backend.inputs_of("denoiser")])
    for i, seed in enumerate((4, 5)):
        np.testing.assert_array_equal(used[:, i], draw(seed, Stream.STEP, (3, 4, 8, 8)))
    monkeypatch.undo()
    runtime.generate(subject, "A car.", steps=1, num_images=2)
    assert not backend.inputs_of("denoiser")[-1]["noise"].any(), "left over from the call before"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_no_numbers_are_not_decoded(runtime, backend, subject, fakes, monkeypatch, value):
    def overflowing(inputs):
        return {**denoiser(inputs), "next_latents": np.full_like(inputs["latents"], value)}

    denoiser = fakes.functions["denoiser"]
    monkeypatch.setitem(fakes.functions, "denoiser", overflowing)
    with pytest.raises(MomaError, match="latents became NaN or infinity while denoising") as caught:
        runtime.generate(subject, "A car.", steps=1)
    assert "\n" not in str(caught.value)
    assert not backend.inputs_of("vae_decoder")
    monkeypatch.undo()
    assert runtime.generate(subject, "A car.", steps=2).images


def test_each_step_is_reported(runtime, subject):
    infos = []
    runtime.generate(subject, "A car.", steps=2, num_images=5, on_step=infos.append)
    assert [(i.step, i.steps) for i in infos] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [i.timestep for i in infos] == [501, 1, 501, 1]


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
    assert runtime.generate(subject, "A car.", steps=1).images, "the turn was given back"


class WatchedLock:
    """A lock that says when somebody has to wait for it."""

    def __init__(self, waited):
        self._lock = threading.Lock()
        self._waited = waited

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            self._waited.set()
            self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()


def test_threads_take_turns(runtime, backend, subject, fakes, monkeypatch):
    expected = [pixels(runtime.generate(subject, "A car.", steps=3, seed=seed)) for seed in range(2)]
    found, inside, denoiser = {}, threading.Event(), fakes.functions["denoiser"]

    def lingering(inputs):
        # The first thread stays in the backend until the second one waits for its turn, or walks in on it.
        if not inside.is_set():
            inside.set()
            assert backend.collided.wait(60), "the second thread neither waited nor entered"
        return denoiser(inputs)

    def work(seed):
        found[seed] = pixels(runtime.generate(subject, "A car.", steps=3, seed=seed))

    monkeypatch.setattr(runtime, "_lock", WatchedLock(backend.collided))
    monkeypatch.setitem(fakes.functions, "denoiser", lingering)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert found.keys() == {0, 1}, "a thread failed"
    for seed, picture in found.items():
        np.testing.assert_array_equal(picture, expected[seed])


WRONG = [
    ({"strength": -0.1}, "strength is -0.1: it must be between 0 and 2"),
    ({"strength": 2.001}, "strength is 2.001: it must be between 0 and 2"),
    ({"strength": math.nan}, "strength is nan: it must be between 0 and 2"),
    ({"strength": "much"}, "strength is 'much': it must be between 0 and 2"),
    ({"strength": 10**400}, f"strength is 1{'0' * 79}...: it must be between 0 and 2"),
    ({"strength": 10**5000}, "strength is <int>: it must be between 0 and 2"),
    ({"strength": 1j}, "strength is 1j: it must be between 0 and 2"),
    ({"strength": np.zeros((2, 1))}, "strength is array([[0.], [0.]]): it must be between 0 and 2"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf: it must be between 0 and 100"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan: it must be between 0 and 100"),
    ({"guidance_scale": 1e39}, "guidance_scale is 1e+39: it must be between 0 and 100"),
    ({"guidance_scale": 100.01}, "guidance_scale is 100.01: it must be between 0 and 100"),
    ({"guidance_scale": 10**400}, "it must be between 0 and 100"),
    ({"guidance_scale": -1}, "guidance_scale is -1: it must be between 0 and 100"),
    ({"steps": 0}, "steps must be 1 to 999, not 0"),
    ({"steps": 2.5}, "steps must be a whole number, 1 to 999, not 2.5"),
    ({"scheduler": "euler-ish"}, "unknown scheduler 'euler-ish'; available: ddim"),
    ({"num_images": 0}, "num_images is 0: it must be from 1 to 64"),
    ({"num_images": 65}, "num_images is 65: it must be from 1 to 64"),
    ({"num_images": 10**5000}, "num_images is <int>: it must be from 1 to 64"),
    ({"num_images": True}, "num_images is True: it must be a whole number from 1 to 64"),
    ({"seed": -1}, "seed must be 0 to 18446744073709551615, not -1"),
    ({"seed": 2**64 - 1, "num_images": 2}, "2 images need seeds up to"),
    ({"latents": np.zeros((1, 4, 8, 7))}, "latents has shape [1, 4, 8, 7]: it must be [1, 4, 8, 8]"),
    ({"latents": np.zeros((1, 4, 8, 8)), "num_images": 2}, "it must be [2, 4, 8, 8]"),
    ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents contains NaN or infinity"),
    ({"context_embedding": np.zeros(17)}, "context_embedding has shape [17]: it must be [16]"),
    ({"context_embedding": np.full(16, np.nan)}, "context_embedding contains NaN or infinity"),
    ({"prompt": "An <image>."}, "prompt must not hold <image>"),
    ({"negative_prompt": "An <image>."}, "negative prompt must not hold <image>"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_input_is_refused_before_any_network_runs(runtime, backend, subject, changes, message):
    arguments = {"prompt": "A car.", "steps": 1, **changes}
    with pytest.raises(InputError) as caught:
        runtime.generate(subject, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert backend.runs == []


@pytest.mark.parametrize("strength", [0, 2, np.float32(0.5)])
def test_the_ends_of_the_range_and_numpy_numbers_are_fine(runtime, backend, subject, strength):
    runtime.generate(subject, "", strength=strength, steps=np.int64(1), num_images=np.int32(1), guidance_scale=0)
    assert backend.inputs_of("denoiser")[0]["strength"].tolist() == [strength]


def test_a_subject_of_another_base_is_refused(tmp_path, fakes, backend, subject):
    runtime = Runtime(Bundle.open(fakes.make_bundle(tmp_path, base="other")), backend)
    with pytest.raises(SubjectError, match=r"'car' was enrolled with base 'fake' .*this bundle is of base 'other'"):
        runtime.generate(subject, "A car.", steps=1)
    assert backend.runs == []


def test_a_subject_of_another_language_model_is_refused_only_where_it_matters(runtime, backend, subject):
    other = dataclasses.replace(subject, origin=dataclasses.replace(subject.origin, language="0" * 64))
    with pytest.raises(SubjectError, match="another language model"):
        runtime.generate(other, "A car.", steps=1)
    assert runtime.generate(other, "A car.", steps=1, context_embedding=np.zeros(16)).images


def test_a_subject_without_prefix_says_what_to_do(runtime, subject):
    other = dataclasses.replace(subject, prefix=None)
    with pytest.raises(SubjectError, match="give context_embedding, or enroll it again"):
        runtime.generate(other, "A car.", steps=1)


@pytest.mark.parametrize("change", ["missing", "wider", "longer"])
def test_a_subject_whose_tensors_do_not_fit_is_refused(runtime, backend, subject, change):
    keys = dict(subject.reference_k)
    name = "down_blocks.0.attentions.0"
    if change == "missing":
        del keys[name]
    elif change == "wider":
        keys[name] = np.zeros((len(keys[name]), 5), np.float32)
    else:
        keys[name] = np.zeros((100, 4), np.float32)
    with pytest.raises(SubjectError, match=f"reference_k.{name} has shape"):
        runtime.generate(dataclasses.replace(subject, reference_k=keys), "A car.", steps=1)
    assert backend.runs == []


def test_an_altered_network_is_refused_when_it_is_needed(tmp_path, fakes, backend, photo, mask):
    bundle = fakes.make_bundle(tmp_path)
    path = bundle / "networks/denoiser/model.onnx"
    path.write_text(path.read_text().replace("denoiser", "denoises"))
    runtime = Runtime(Bundle.open(bundle), backend)
    subject = runtime.enroll(photo, mask, "car")
    with pytest.raises(BundleError, match="networks/denoiser/model.onnx was altered"):
        runtime.generate(subject, "A car.", steps=1)
    assert "denoiser" not in backend.loads


def test_networks_are_loaded_when_needed_and_once(runtime, backend, photo, mask):
    assert backend.loads == []
    subject = runtime.enroll(photo, mask, "car")
    assert "denoiser" not in backend.loads
    for _ in range(2):
        runtime.generate(subject, "A car.", steps=1)
    assert len(backend.loads) == len(set(backend.loads)) == 8
