"""Request batching: each request keeps its own subject, prompt, strength and seed, and its own result or error."""

import dataclasses
import threading

import numpy as np
import pytest

from moma_rt.bundle.manifest import Bundle, read_manifest
from moma_rt.errors import Cancelled, InputError, MomaError
from moma_rt.memory.limits import Limits
from moma_rt.runtime import Runtime
from tests.moma_rt.waiting import wait_until


@pytest.fixture
def batching(fake_bundle, backend):
    return Runtime(Bundle.open(fake_bundle), backend, limits=Limits(max_batch=4))


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def run_queued(runtime, fakes, monkeypatch, calls):
    """Results or errors of `generate` calls of which all but the first are queued while that one runs."""
    entered, go_on, found = threading.Event(), threading.Event(), {}
    denoiser = fakes.functions["denoiser"]

    def lingering(inputs):
        if not entered.is_set():
            entered.set()
            assert go_on.wait(60)
        return denoiser(inputs)

    def work(index):
        subject, prompt, options = calls[index]
        try:
            found[index] = runtime.generate(subject, prompt, **options)
        except Exception as error:
            found[index] = error

    monkeypatch.setitem(fakes.functions, "denoiser", lingering)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    threads[0].start()
    assert entered.wait(60)
    for count, thread in enumerate(threads[1:], 1):
        thread.start()
        wait_until(lambda count=count: len(runtime._queue._waiting) >= count)
    go_on.set()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(calls))]


def test_a_subject_is_hashed_before_its_request_waits(runtime, subject):
    loaded = dataclasses.replace(subject)
    call = threading.Thread(target=runtime.generate, args=(loaded, "A car."), kwargs={"steps": 1})
    with runtime._queue.exclusive():
        call.start()
        wait_until(lambda: runtime._queue._waiting)
        assert "identity" in vars(loaded)
    call.join()


@pytest.fixture
def subjects(batching, photo, mask):
    """Four subjects with different numbers of reference tokens."""
    found = []
    for index, name in enumerate(("car", "cup", "red hat", "dog")):
        taller = mask.copy()
        taller.paste(255, (12, 24, 84, 40 + 12 * index))
        found.append(batching.enroll(photo.rotate(7 * index), taller, name))
    assert len({subject.token_counts()[8] for subject in found}) > 1
    return found


def test_a_batch_of_four_subjects_equals_single_requests(batching, backend, subjects, fakes, monkeypatch):
    calls = [(subjects[0], "A car.", {"steps": 3})]
    calls += [
        (subject, f"A {subject.name} on a beach.", {"steps": 3, "seed": index, "strength": 0.3 * index})
        for index, subject in enumerate(subjects)
    ]
    expected = [batching.generate(subject, prompt, **options) for subject, prompt, options in calls]
    backend.runs.clear()
    found = run_queued(batching, fakes, monkeypatch, calls)
    assert [len(inputs["latents"]) for inputs in backend.inputs_of("denoiser")] == [1] * 3 + [4] * 3
    for result, wanted in zip(found, expected, strict=True):
        assert result.seeds == wanted.seeds
        assert np.abs(pixels(result).astype(int) - pixels(wanted)).max() <= 1
        np.testing.assert_allclose(result.foreground_masks, wanted.foreground_masks, rtol=1e-5)


def test_pictures_of_one_request_stay_in_one_batch(batching, backend, subjects, fakes, monkeypatch):
    calls = [(subjects[0], "A car.", {"steps": 1})]
    calls += [
        (s, "A car.", {"steps": 1, "num_images": n, "seed": n}) for s, n in zip(subjects, (3, 1, 2), strict=False)
    ]
    expected = [batching.generate(subject, prompt, **options) for subject, prompt, options in calls]
    backend.runs.clear()
    found = run_queued(batching, fakes, monkeypatch, calls)
    assert sum(len(inputs["latents"]) for inputs in backend.inputs_of("denoiser")) == 7
    assert len(backend.inputs_of("denoiser")) == 3, "batches of 1, 3 + 1 and 2, or of 1, 1 + 2 and 3"
    for result, wanted in zip(found, expected, strict=True):
        assert len(result.images) == len(wanted.images)
        assert np.abs(pixels(result).astype(int) - pixels(wanted)).max() <= 1


@pytest.mark.parametrize(
    "other", [{"steps": 2}, {"steps": 3, "guidance_scale": 2.0}, {"steps": 3, "scheduler": "euler"}]
)
def test_requests_with_different_schedules_share_no_batch(batching, backend, subjects, fakes, monkeypatch, other):
    calls = [
        (subjects[0], "A car.", {"steps": 3}),
        (subjects[0], "A car.", {"steps": 3}),
        (subjects[1], "A cup.", other),
    ]
    backend.runs.clear()
    found = run_queued(batching, fakes, monkeypatch, calls)
    assert {len(inputs["latents"]) for inputs in backend.inputs_of("denoiser")} == {1}
    assert all(result.images for result in found)


def test_an_invalid_request_fails_alone(batching, subjects, fakes, monkeypatch):
    expected = pixels(batching.generate(subjects[1], "A cup.", steps=2))
    unreadable = "x" * 5000
    calls = [(subjects[0], "A car.", {"steps": 2}), (subjects[1], "A cup.", {"steps": 2})]
    calls += [(subjects[0], unreadable, {"steps": 2}), (subjects[3], "A dog.", {"steps": 2})]
    first, good, bad, fine = run_queued(batching, fakes, monkeypatch, calls)
    assert isinstance(bad, InputError)
    np.testing.assert_array_equal(pixels(good), expected)
    assert first.images
    assert fine.images


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_latents_fail_only_their_own_request(batching, subjects, fakes, monkeypatch):
    plain = fakes.functions["denoiser"]

    def overflowing(inputs):
        outputs = plain(inputs)
        outputs["next_latents"] = np.where(
            inputs["strength"][:, None, None, None] > 1.5, np.nan, outputs["next_latents"]
        )
        return outputs

    monkeypatch.setitem(fakes.functions, "denoiser", overflowing)
    calls = [(subjects[0], "A car.", {"steps": 2})]
    calls += [(subjects[1], "A cup.", {"steps": 2, "strength": strength}) for strength in (1.0, 2.0)]
    _, good, bad = run_queued(batching, fakes, monkeypatch, calls)
    assert good.images
    assert isinstance(bad, MomaError)
    assert "NaN or infinity" in str(bad)


def test_a_failed_batch_is_retried_one_by_one(batching, subjects, fakes, monkeypatch):
    plain = fakes.functions["denoiser"]

    def crowded(inputs):
        if len(inputs["latents"]) > 1:
            raise MomaError("out of memory for two")
        return plain(inputs)

    monkeypatch.setitem(fakes.functions, "denoiser", crowded)
    calls = [(subject, "A car.", {"steps": 2}) for subject in subjects]
    found = run_queued(batching, fakes, monkeypatch, calls)
    for result, subject in zip(found, subjects, strict=True):
        np.testing.assert_array_equal(pixels(result), pixels(batching.generate(subject, "A car.", steps=2)))


def test_max_batch_is_at_most_the_bundles_largest(fake_bundle, fakes):
    runtime = Runtime(Bundle.open(fake_bundle), fakes.FakeBackend(), limits=Limits(max_batch=16))
    assert runtime._queue._max_batch == fakes.max_batch
    without = read_manifest(fake_bundle)
    networks = {name: entry for name, entry in without.networks.items() if name != "denoiser"}
    bundle = Bundle(fake_bundle, dataclasses.replace(without, networks=networks))
    assert Runtime(bundle, fakes.FakeBackend(), limits=Limits(max_batch=16))._queue._max_batch == fakes.max_batch


def test_a_request_with_a_callback_runs_alone(batching, backend, subjects, fakes, monkeypatch):
    seen = []
    calls = [(subjects[0], "A car.", {"steps": 2})]
    calls.append((subjects[1], "A cup.", {"steps": 2, "on_step": lambda info: seen.append(info.step)}))
    calls.append((subjects[2], "A hat.", {"steps": 2, "on_step": lambda info: False}))
    calls.append((subjects[3], "A dog.", {"steps": 2}))
    first, told, cancelled, last = run_queued(batching, fakes, monkeypatch, calls)
    assert seen == [1, 2]
    assert isinstance(cancelled, Cancelled)
    assert all(result.images for result in (first, told, last))


def test_requests_are_not_batched_by_default(runtime, backend, subject, fakes, monkeypatch):
    calls = [(subject, "A car.", {"steps": 1, "seed": seed}) for seed in range(3)]
    backend.runs.clear()
    run_queued(runtime, fakes, monkeypatch, calls)
    assert [len(inputs["latents"]) for inputs in backend.inputs_of("denoiser")] == [1, 1, 1]


@pytest.mark.parametrize("most", [0, 65, -1, 1.5, True, "4", None])
def test_max_batch_out_of_range_is_refused(fake_bundle, most):
    with pytest.raises(InputError, match="max_batch is .*: it must be a whole number from 1 to 64"):
        Runtime.load(fake_bundle, max_batch=most)
