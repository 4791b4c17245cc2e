"""Whole generations on inductor engines, which `Runtime.load` uses if the backend is named."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from moma_rt.backends.inductor import InductorBackend, TorchBound
from moma_rt.bundle.footprint import combined_bytes, footprint
from moma_rt.bundle.manifest import read_manifest, write_manifest
from moma_rt.cli import entry
from moma_rt.errors import BundleError, Cancelled, MomaError, OutOfMemory
from moma_rt.runtime import Runtime
from tests.moma_rt.batching import assert_same, calls_of, check_four_subjects, four_subjects, run_queued

PROMPT = "A car on a beach."
EMBEDDING = np.random.default_rng(1).standard_normal(1024).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """Run PyTorch on one thread: the networks are so small that several would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subjects(small_bundles, photo, mask):
    return four_subjects(Runtime.load(small_bundles[0], "onnxruntime"), photo, mask)


@pytest.fixture(scope="module")
def subject(subjects):
    return subjects[0]


@pytest.fixture
def copied(small_bundles, tmp_path):
    """A writable copy of the bundle with engines."""
    root = shutil.copytree(small_bundles[1], tmp_path / "bundle")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


@pytest.mark.parametrize(
    "options",
    [
        # Two batches: of four pictures and of one.
        {"num_images": 5, "steps": 3},
        {"guidance_scale": 1.0, "strength": 0.4, "steps": 4},
        # With fresh noise, and steps with and without guidance.
        {"scheduler": "tcd", "guidance_interval": (300, 400), "steps": 8},
    ],
    ids=["batches", "unguided", "both"],
)
def test_the_same_pictures_as_onnxruntime(on_a_cpu, small_bundles, subject, options):
    found, wanted = (
        Runtime.load(small_bundles[1], backend).generate(subject, PROMPT, context_embedding=EMBEDDING, **options)
        for backend in ("inductor", "onnxruntime")
    )
    for image, expected in zip(found.images, wanted.images, strict=True):
        assert np.asarray(expected).std() > 10
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    for mask, expected in zip(found.foreground_masks, wanted.foreground_masks, strict=True):
        np.testing.assert_allclose(mask, expected, atol=1e-4)


@pytest.fixture(scope="module")
def batching(small_bundles):
    with pytest.MonkeyPatch.context() as patch:
        # As `on_a_cpu` does for each test.
        for module in ("moma_rt.backends", "moma_rt.backends.selection"):
            patch.setattr(f"{module}.local_device", lambda: None)
        return Runtime.load(small_bundles[1], "inductor", max_batch=4)


def test_a_batch_of_four_subjects_equals_single_requests(on_a_cpu, batching, subjects):
    check_four_subjects(batching, subjects, context_embedding=EMBEDDING)


def test_a_cancelled_and_a_failing_request_do_not_affect_others(on_a_cpu, batching, subjects):
    good, cancelled, failing, other = calls_of(subjects, steps=2, context_embedding=EMBEDDING)
    expected = [batching.generate(subject, prompt, **options) for subject, prompt, options in (good, other)]
    cancelled[2]["on_step"] = lambda info: False
    size = batching.bundle.manifest.geometry.latent_size
    failing[2]["latents"] = np.full((1, 4, size, size), 3e38, np.float32)
    first, second, third, last = run_queued(batching, [good, cancelled, failing, other], context_embedding=EMBEDDING)
    assert type(second) is Cancelled
    assert type(third) is MomaError
    assert "NaN or infinity" in str(third)
    for result, wanted in zip((first, last), expected, strict=True):
        assert_same(result, wanted)


def test_a_batch_that_runs_out_of_memory_is_retried_one_by_one(on_a_cpu, batching, subjects, monkeypatch):
    calls = calls_of(subjects[:2], steps=1, context_embedding=EMBEDDING)
    expected = [batching.generate(subject, prompt, **options) for subject, prompt, options in calls]
    enqueue, refused = TorchBound.enqueue, []

    def crowded(bound):
        if bound.name == "denoiser" and len(bound.outputs[0]) > 1:
            refused.append(len(bound.outputs[0]))
            raise OutOfMemory("no memory left")
        enqueue(bound)

    monkeypatch.setattr(TorchBound, "enqueue", crowded)
    found = run_queued(batching, calls, context_embedding=EMBEDDING)
    assert set(refused) == {2}
    for result, wanted in zip(found, expected, strict=True):
        assert_same(result, wanted)


def test_packages_are_evicted_to_fit_a_memory_budget(on_a_cpu, small_bundles, subject, monkeypatch):
    manifest = read_manifest(small_bundles[1])
    size = {
        engine.network: combined_bytes([footprint(manifest, engine.network, engine)]) for engine in manifest.engines
    }
    budget = size["denoiser"] + size["vae_decoder"] + min(size["text_encoder"], size["context_projector"])
    expected = Runtime.load(small_bundles[1], "inductor").generate(
        subject, PROMPT, steps=1, context_embedding=EMBEDDING
    )
    load, loads = InductorBackend.load, []

    def counted(backend, spec, path, weights):
        loads.append(spec.name)
        return load(backend, spec, path, weights)

    monkeypatch.setattr(InductorBackend, "load", counted)
    runtime = Runtime.load(small_bundles[1], "inductor", memory_budget=budget)
    for prompt in ("Snow.", PROMPT):
        result = runtime.generate(subject, prompt, steps=1, context_embedding=EMBEDDING)
    assert loads.count("text_encoder") == 2
    assert_same(result, expected)


def test_every_call_gives_the_same_bytes(on_a_cpu, small_bundles, subject):
    runtime = Runtime.load(small_bundles[1], "inductor", threads=1)
    first, second = (runtime.generate(subject, PROMPT, steps=2, context_embedding=EMBEDDING) for _ in range(2))
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_engines_for_a_cpu_are_used_only_if_named(on_a_cpu, small_bundles):
    assert Runtime.load(small_bundles[1], "inductor")._networks.backend.name == "inductor"
    assert Runtime.load(small_bundles[1])._networks.backend.name == "onnxruntime"


def test_the_backend_option_of_the_command_line(on_a_cpu, small_bundles, subject, tmp_path, capsys):
    subject.save(tmp_path / "car.subject")
    np.save(tmp_path / "embedding.npy", EMBEDDING)
    out = tmp_path / "car.png"
    arguments = [small_bundles[1], tmp_path / "car.subject", PROMPT, "--steps", 1, "--out", out, "--quiet"]
    arguments += ["--context-embedding", tmp_path / "embedding.npy", "--backend", "inductor"]
    assert entry(["generate", *map(str, arguments)]) == 0
    assert out.is_file()
    assert capsys.readouterr() == ("", "")


def test_an_altered_package_is_not_loaded(on_a_cpu, copied, subject, monkeypatch):
    monkeypatch.setattr("moma_rt.backends.inductor.InductorBackend._runner", lambda *_: pytest.fail("it was loaded"))
    (path,) = copied.glob("engines/text_encoder-*/engine.pt2")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    runtime = Runtime.load(copied, "inductor")
    with pytest.raises(BundleError, match=r"engines/text_encoder-\w+/engine.pt2 was altered: its SHA-256 is"):
        runtime.generate(subject, PROMPT, steps=1, context_embedding=EMBEDDING)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"version": "2.0.0"},
            r"for inductor \S+ on cpu \(this machine's CPU\); the bundle has engines for inductor 2.0.0",
        ),
        (
            {"capabilities": (90,)},
            r"no engine of .*denoiser.* for inductor \S+ on cpu .* for inductor \S+ on sm90: build",
        ),
    ],
)
def test_engines_for_something_else_are_refused(on_a_cpu, copied, changes, said):
    manifest = read_manifest(copied)
    engines = tuple(dataclasses.replace(engine, **changes) for engine in manifest.engines)
    write_manifest(copied, dataclasses.replace(manifest, engines=engines))
    with pytest.raises(BundleError, match=said):
        Runtime.load(copied, "inductor")
