"""Whole generations on inductor's engines, which `Runtime.load` takes where they are named."""

import dataclasses
import shutil

import numpy as np
import pytest

from moma_rt.bundle import read_manifest, write_manifest
from moma_rt.cli import entry
from moma_rt.errors import BundleError
from moma_rt.runtime import Runtime

PROMPT = "A car on a beach."
EMBEDDING = np.random.default_rng(1).standard_normal(1024).astype(np.float32)


@pytest.fixture(scope="module")
def subject(small_bundles, photo, mask):
    return Runtime.load(small_bundles[0], "onnxruntime").enroll(photo, mask, "car")


@pytest.fixture
def copied(small_bundles, tmp_path):
    """The bundle with engines, which may be changed."""
    root = shutil.copytree(small_bundles[1], tmp_path / "bundle")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


@pytest.mark.parametrize(
    "options",
    [
        # Two passes: of four pictures and of one.
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


def test_the_same_bytes_at_every_call(on_a_cpu, small_bundles, subject):
    runtime = Runtime.load(small_bundles[1], "inductor", threads=1)
    first, second = (runtime.generate(subject, PROMPT, steps=2, context_embedding=EMBEDDING) for _ in range(2))
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_engines_for_a_cpu_are_taken_where_they_are_named(on_a_cpu, small_bundles):
    assert Runtime.load(small_bundles[1], "inductor")._networks.backend.name == "inductor"
    assert Runtime.load(small_bundles[1])._networks.backend.name == "onnxruntime"


def test_the_command_line_names_it(on_a_cpu, small_bundles, subject, tmp_path, capsys):
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


def test_a_missing_package_is_named(on_a_cpu, copied):
    (path,) = copied.glob("engines/denoiser-*/engine.pt2")
    path.unlink()
    with pytest.raises(BundleError, match=r"engines/denoiser-\w+/engine.pt2 is missing; build the bundle again"):
        Runtime.load(copied, "inductor")


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
