"""The subject cache, and switching between subjects, on a fake GPU."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from moma_rt.backends.tensorrt import TensorRtBackend
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import InputError, MomaError
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject
from moma_rt.timing import StageTimer
from tests.moma_rt.fake_cuda import CudaError
from tests.moma_rt.test_runtime_engines import bundle, gpu  # noqa: F401
from tests.moma_rt.test_runtime_out_of_memory import leave_no_free_memory

PROMPT = "A car on a beach."
UP, WITHIN = "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToDevice"


@pytest.fixture
def enrolled(bundle, fakes, photo, mask):  # noqa: F811
    """Subjects of different photos, and each one's pictures on a host backend."""
    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    subjects = [plain.enroll(photo.rotate(90 * i), mask, "car") for i in range(4)]
    return subjects, [pixels(plain.generate(subject, PROMPT, steps=2)) for subject in subjects]


@pytest.fixture
def load(gpu, bundle):  # noqa: F811
    return lambda **options: Runtime.load(bundle, "tensorrt", **options)


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def count_cached(runtime, network="denoiser"):
    """The number of subjects whose inputs of a network are cached."""
    return sum(name == network for name, _ in runtime._subjects._cached._values)


def subject_bytes(subject):
    return sum(array.nbytes for array in subject.inputs().values())


def copied(gpu, kind, call):  # noqa: F811
    before = gpu.cuda.copied[kind]
    call()
    return gpu.cuda.copied[kind] - before


def test_a_subject_is_uploaded_once_and_copied_within_the_device_from_then_on(gpu, load, enrolled):  # noqa: F811
    subjects, expected = enrolled
    runtime = load()
    first = [copied(gpu, UP, lambda s=s: runtime.generate(s, PROMPT, steps=2)) for s in subjects]
    # Each call uploads its conditions, and from the second subject on also the seeds' latents.
    for subject, pictures, before in zip(subjects, expected, first, strict=True):
        again = copied(gpu, UP, lambda s=subject, p=pictures: np.testing.assert_array_equal(
            pixels(runtime.generate(s, PROMPT, steps=2)), p))  # fmt: skip
        assert again <= before - subject_bytes(subject)
    assert copied(gpu, WITHIN, lambda: runtime.generate(subjects[0], PROMPT, steps=2)) >= subject_bytes(subjects[0])


def test_the_subject_in_the_input_buffers_is_not_copied_again(gpu, load, enrolled):  # noqa: F811
    subjects, _ = enrolled
    runtime = load()
    for _ in range(2):
        runtime.generate(subjects[0], PROMPT, steps=2)
    assert copied(gpu, WITHIN, lambda: runtime.generate(subjects[0], PROMPT, steps=2)) < subject_bytes(subjects[0])


def test_a_subject_that_is_loaded_again_is_found_in_the_cache(gpu, load, enrolled, tmp_path):  # noqa: F811
    subjects, expected = enrolled
    for i, subject in enumerate(subjects[:2]):
        subject.save(tmp_path / f"{i}.subject")
    runtime = load()
    for i in (0, 1, 0, 1):
        found = pixels(runtime.generate(Subject.load(tmp_path / f"{i}.subject"), PROMPT, steps=2))
        np.testing.assert_array_equal(found, expected[i])
    assert count_cached(runtime) == 2


def test_the_least_recently_used_subject_is_evicted(gpu, load, enrolled, monkeypatch):  # noqa: F811
    subjects, expected = enrolled
    uploads = []
    upload = SubjectCache._upload
    monkeypatch.setattr(SubjectCache, "_upload", lambda self, *of: uploads.append(of) or upload(self, *of))
    runtime = load(subject_memory=2 * max(map(subject_bytes, subjects)))
    embedding = np.zeros(runtime.bundle.manifest.geometry.embedding_width)

    def is_uploaded(index):
        uploads.clear()
        # With an embedding, so that no prefixes take part.
        runtime.generate(subjects[index], PROMPT, steps=2, context_embedding=embedding)
        return bool(uploads)

    order = (0, 1, 0, 2, 0, 2, 1, 0)
    assert [is_uploaded(i) for i in order] == [True, True, False, True, False, False, True, True]
    assert count_cached(runtime) == 2
    used = gpu.cuda.used
    for i in (3, 2, 1, 0):
        assert is_uploaded(i)
    assert gpu.cuda.used == used


def test_a_prefix_is_uploaded_once_for_all_prompts(gpu, load, enrolled):  # noqa: F811
    subjects, _ = enrolled
    runtime = load()

    def ask(prompt):
        return copied(gpu, UP, lambda: runtime.generate(subjects[0], prompt, steps=2))

    first, second = ask("A car on a hill."), ask("A car in a tree.")
    prefix = subjects[0].prefix.kv.nbytes
    assert first - second >= prefix + subject_bytes(subjects[0])
    assert count_cached(runtime, "language_model") == 1


def test_a_prefix_is_uploaded_after_the_language_model_is_loaded(load, enrolled, monkeypatch):
    """Loading it may evict the cached subjects."""
    done = []
    upload, load_network = SubjectCache._upload, TensorRtBackend.load
    monkeypatch.setattr(SubjectCache, "_upload", lambda self, *of: done.append("upload") or upload(self, *of))
    monkeypatch.setattr(TensorRtBackend, "load", lambda self, *of: done.append(of[0].name) or load_network(self, *of))
    load()._conditioner.context_tokens(enrolled[0][0], PROMPT, StageTimer())
    assert done == ["language_model", "upload", "context_projector"]


def test_out_of_memory_for_a_prefix_evicts_buffers(gpu, load, enrolled):  # noqa: F811
    subject, prompt = enrolled[0][0], "A car in a tree."
    expected = load()._conditioner.context_tokens(subject, prompt, StageTimer())
    runtime = load()
    runtime.generate(subject, PROMPT, steps=2)
    runtime._subjects._cached.clear()
    gpu.cuda.capacity = gpu.cuda.used
    np.testing.assert_array_equal(runtime._conditioner.context_tokens(subject, prompt, StageTimer()), expected)


def test_a_prompt_downloads_its_embedding_and_no_keys_and_values(gpu, load, enrolled):  # noqa: F811
    runtime = load()
    ask = partial(runtime._conditioner.context_tokens, enrolled[0][0], PROMPT, StageTimer())
    assert copied(gpu, "cudaMemcpyDeviceToHost", ask) == 4 * (16 + 4 * 6), "and the context tokens"


def test_a_prompt_that_merges_into_the_prefix(gpu, load, enrolled, bundle, fakes):  # noqa: F811
    """Only the common tokens are reused, from the copy in host memory."""
    subject = enrolled[0][0]
    ids = subject.prefix.ids.copy()
    ids[-1] += 1
    altered = dataclasses.replace(subject, prefix=dataclasses.replace(subject.prefix, ids=ids))
    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    runtime = load()
    found, expected = (pixels(r.generate(altered, PROMPT, steps=2)) for r in (runtime, plain))
    np.testing.assert_array_equal(found, expected)
    assert count_cached(runtime, "language_model") == 0


def test_new_prompts_need_no_new_contexts(gpu, load, enrolled):  # noqa: F811
    subjects, _ = enrolled
    runtime = load()
    runtime.generate(subjects[0], "A car on a hill.", steps=2)
    made = len(gpu.trt.contexts)
    for prompt in ("A car.", "A car in a tree, and a bird, and another bird.", "A car on a train."):
        runtime.generate(subjects[0], prompt, steps=2)
    assert len(gpu.trt.contexts) == made


def test_trim_frees_idle_contexts(gpu, load, enrolled):  # noqa: F811
    runtime = load()
    runtime.generate(enrolled[0][0], PROMPT, steps=2)
    alive = [c() for c in gpu.trt.contexts if c() is not None]
    assert {context.engine.spec.name for context in alive} >= {"text_encoder", "context_projector", "denoiser"}
    del alive
    runtime._networks.backend.trim()
    alive = [c().engine.spec.name for c in gpu.trt.contexts if c() is not None]
    assert set(alive) == {"denoiser", "vae_decoder"}


def test_a_subject_larger_than_the_budget_is_used_all_the_same(gpu, load, enrolled):  # noqa: F811
    subjects, expected = enrolled
    runtime = load(subject_memory=1)
    for i in (0, 1, 0):
        np.testing.assert_array_equal(pixels(runtime.generate(subjects[i], PROMPT, steps=2)), expected[i])
        assert count_cached(runtime) == 1


def test_out_of_memory_for_pictures_evicts_subjects(gpu, load, enrolled):  # noqa: F811
    subjects, expected = enrolled
    runtime = load()
    for subject in subjects[:3]:
        runtime.generate(subject, PROMPT, steps=2)
    gpu.cuda.capacity = gpu.cuda.used + 100
    np.testing.assert_array_equal(pixels(runtime.generate(subjects[3], PROMPT, steps=2)), expected[3])
    assert count_cached(runtime) == 1


def test_other_subjects_are_evicted_before_graphs(gpu, load, enrolled):  # noqa: F811
    """They are uploaded again in milliseconds, and capturing a graph again takes as long as a picture."""
    subjects, expected = enrolled
    runtime = load()
    for i in (3, 0, 1, 2):
        runtime.generate(subjects[i], PROMPT, steps=2)
    del runtime._subjects._cached._values["denoiser", subjects[3].identity]
    leave_no_free_memory(gpu, runtime)
    launches, graphs = gpu.cuda.launches, set(gpu.cuda.graphs)
    np.testing.assert_array_equal(pixels(runtime.generate(subjects[3], PROMPT, steps=2)), expected[3])
    assert (gpu.cuda.launches, set(gpu.cuda.graphs)) == (launches + 1, graphs)
    assert count_cached(runtime) == 1


def test_a_subject_that_was_just_used_is_evicted_too(gpu, load, enrolled):  # noqa: F811
    """Its memory is freed once the copies from it have run."""
    runtime = load()
    runtime._subjects.reference(enrolled[0][0])
    assert gpu.cuda.queue
    gpu.cuda.capacity = gpu.cuda.used
    runtime._subjects.reference(enrolled[0][1])
    assert count_cached(runtime) == 1


def test_all_subjects_are_evicted_when_a_network_is_unloaded(gpu, load, enrolled, photo, mask):  # noqa: F811
    subjects, expected = enrolled
    # Each engine counts 7 bytes here: the budget fits the two generation networks and no third one.
    runtime = load(memory_budget=14)
    for i in (0, 1):
        np.testing.assert_array_equal(pixels(runtime.generate(subjects[i], PROMPT, steps=2)), expected[i])
        assert count_cached(runtime) == 1
    runtime.generate(subjects[0], PROMPT, steps=2, num_images=4)
    runtime.enroll(photo, mask, "car")
    assert count_cached(runtime) == 0
    assert gpu.cuda.used < subject_bytes(subjects[0]), "only the scratch region of the last network"


def test_out_of_memory_for_a_subject_evicts_buffers_of_other_sizes(gpu, load, enrolled):  # noqa: F811
    subjects, expected = enrolled
    runtime = load()
    for i, count in ((1, 1), (0, 2), (0, 1)):
        runtime.generate(subjects[i], PROMPT, steps=2, num_images=count)
    runtime._subjects._cached.clear()
    leave_no_free_memory(gpu, runtime)
    for _ in range(2):
        launches, graphs = gpu.cuda.launches, set(gpu.cuda.graphs)
        np.testing.assert_array_equal(pixels(runtime.generate(subjects[1], PROMPT, steps=2)), expected[1])
        assert gpu.cuda.launches == launches + 1
        assert len(runtime._sampler._buffers) == 1
    assert set(gpu.cuda.graphs) == graphs, "the graphs captured in their place are replayed"


def test_an_upload_that_fails_leaves_no_half_subject(gpu, load, enrolled, monkeypatch):  # noqa: F811
    subjects, expected = enrolled
    runtime = load()
    runtime.generate(subjects[0], PROMPT, steps=2)
    gpu.cuda.failures["cudaMemcpyAsync"] = CudaError.cudaErrorIllegalAddress
    monkeypatch.setattr("moma_rt.memory.buffers.GenerationBuffers.set_schedule", lambda *_: None)
    with pytest.raises(MomaError, match="cudaMemcpyAsync"):
        runtime.generate(subjects[1], PROMPT, steps=2)
    monkeypatch.undo()
    for i in (1, 0):
        np.testing.assert_array_equal(pixels(runtime.generate(subjects[i], PROMPT, steps=2)), expected[i])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_fewer_tokens_after_more_leave_nothing_behind(load, bundle, fakes, photo, mask):  # noqa: F811
    """Not even a NaN where the mask is zero: 0 * NaN is NaN."""
    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    many = plain.enroll(photo, mask, "car")
    few = dataclasses.replace(
        many,
        **{
            field: {
                name: t[:17] if len(t) == len(many.object_mask[8]) else t for name, t in getattr(many, field).items()
            }
            for field in ("reference_k", "reference_v", "object_mask")
        },
    )
    broken = dataclasses.replace(many, reference_k={name: k * np.nan for name, k in many.reference_k.items()})
    runtime = load()
    with pytest.raises(MomaError, match="NaN"):
        runtime.generate(broken, PROMPT, steps=2)
    expected = pixels(plain.generate(few, PROMPT, steps=2))
    np.testing.assert_array_equal(pixels(runtime.generate(few, PROMPT, steps=2)), expected)


def test_nothing_is_cached_on_a_host_backend(fake_bundle, backend, subject):
    runtime = Runtime(Bundle.open(fake_bundle), backend)
    runtime.generate(subject, PROMPT, steps=1)
    assert count_cached(runtime) == 0
    assert backend.allocations.count(subject.prefix.kv.shape) == 1, "only the language model's input buffer"
    on_a_device = Runtime(Bundle.open(fake_bundle), dataclasses.replace(backend, is_host=False))
    on_a_device.generate(subject, PROMPT, steps=1)
    assert count_cached(on_a_device) == 1


@pytest.mark.parametrize("name", ["subject_memory", "graph_memory"])
@pytest.mark.parametrize("given", [0, -1, "many", None, True, "1TB", float("nan")])
def test_memory_limits_that_are_invalid(fake_bundle, name, given):
    with pytest.raises(InputError, match=f"^{name} is a number of bytes below"):
        Runtime.load(fake_bundle, **{name: given})
