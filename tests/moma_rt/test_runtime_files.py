"""A bundle whose folder moves, vanishes or cannot be read while a runtime has it open."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import BundleError
from moma_rt.runtime import Runtime


@pytest.fixture
def copied(fake_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fake_bundle, tmp_path / "bundle")


def test_a_runtime_of_a_relative_path_outlives_a_change_of_folder(copied, subject, fakes, monkeypatch, tmp_path):
    expected = Runtime(Bundle.open(copied), fakes.FakeBackend()).generate(subject, "A car.", steps=2).images[0]
    monkeypatch.chdir(tmp_path)
    runtime = Runtime(Bundle.open("bundle"), fakes.FakeBackend())
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(runtime.generate(subject, "A car.", steps=2).images[0], expected)


def test_a_runtime_keeps_the_bundle_that_a_link_led_to(copied, subject, fakes, tmp_path):
    """As a deployment that sets `current` to the next release."""
    fakes.make_bundle(tmp_path / "next", base="next")
    (tmp_path / "current").symlink_to("bundle")
    runtime = Runtime(Bundle.open(tmp_path / "current"), fakes.FakeBackend())
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("next")
    runtime.generate(subject, "A car.", steps=2)


@pytest.mark.parametrize("part", ["networks", "weights", "tokenizers", "tokenizers/text.json", "weights/denoiser", ""])
def test_files_that_went_are_a_bundle_error(copied, subject, fakes, part):
    runtime = Runtime(Bundle.open(copied), fakes.FakeBackend())
    place = copied / part
    place.unlink() if place.is_file() else shutil.rmtree(place)
    with pytest.raises(BundleError, match="is missing; build the bundle again|the bundle is no longer there") as caught:
        runtime.generate(subject, "A car.", steps=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizers/text.json", "networks/denoiser/model.onnx", "weights/denoiser"])
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_files_of_another_user_are_a_bundle_error(fake_bundle, subject, fakes, name):
    # Not below pytest's folder, which is closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = shutil.copytree(fake_bundle, Path(folder) / "bundle")
        root.chmod(0o755)
        runtime = Runtime(Bundle.open(root), fakes.FakeBackend())
        (root / name).chmod(0o700 if (root / name).is_dir() else 0o600)
        os.seteuid(12345)
        try:
            with pytest.raises(BundleError, match=f"{name}.* cannot be read: Permission denied"):
                runtime.generate(subject, "A car.", steps=2)
        finally:
            os.seteuid(0)


def test_a_file_that_goes_between_its_check_and_its_use(copied, subject, fakes, monkeypatch):
    backend = fakes.FakeBackend()

    def fail(spec, path, weights=()):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(backend, "load", fail)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read: Stale file handle"):
        Runtime(Bundle.open(copied), backend).generate(subject, "A car.", steps=2)
