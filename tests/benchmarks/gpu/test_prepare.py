"""The prepare step: it installs wheels, completes a bundle without weights, and makes a subject."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import prepare
from benchmarks.gpu.pack import pack_bundle
from benchmarks.gpu.prepare import build, check_engines, install, keep_parts, main, random_subject, unpack
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import BundleError, InputError, MomaError
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject


def make_wheel(folder, name):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: gone\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_only_missing_packages_are_installed(tmp_path):
    wheels = [make_wheel(tmp_path, "carried_module"), make_wheel(tmp_path, "numpy")]
    install(wheels, tmp_path / "packages")
    names = {path.name for path in (tmp_path / "packages").iterdir()}
    assert "carried_module.py" in names
    assert "numpy.py" not in names
    code = "import carried_module; print(carried_module.VALUE)"
    environment = {"PYTHONPATH": str(tmp_path / "packages")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n"


def test_an_invalid_wheel_is_an_error(tmp_path):
    wheel = tmp_path / "carried_module-1.0-py3-none-any.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(MomaError, match="pip install"):
        install([wheel], tmp_path / "packages")


def test_parts_for_a_later_call_are_kept(tmp_path):
    (tmp_path / "part").write_bytes(b"x")
    (tmp_path / "work").mkdir()
    keep_parts([tmp_path / "part"], tmp_path / "work")
    assert (tmp_path / "work" / "part").read_bytes() == b"x"


@pytest.fixture(scope="module")
def packed(small_bundles, tmp_path_factory):
    """The archive of a bundle with engines."""
    archive = tmp_path_factory.mktemp("carried") / "bundle.tar.xz"
    pack_bundle(small_bundles[1], archive)
    return archive


def test_a_bundle_is_carried_without_weights(packed, small_bundles, tmp_path):
    unpack(packed, tmp_path / "there" / "bundle")
    there = tmp_path / "there" / "bundle"
    whole = small_bundles[1]
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert found == {name for name in files if not name.startswith(("weights/", "."))}
    assert found != files
    assert packed.stat().st_size < 0.7 * sum((whole / name).stat().st_size for name in files)
    # An existing bundle is left alone.
    (there / "manifest.json").write_text("mine")
    unpack(packed, there)
    assert (there / "manifest.json").read_text() == "mine"
    assert [path.name for path in there.parent.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_carried_bundle_is_completed_and_compiles_nothing(tmp_path):
    pytest.importorskip("diffusers")
    options = ["--base", "tiny", "--precision", "fp32", "--only", "context_projector", "--target", "inductor"]
    here, there = tmp_path / "here" / "bundle", tmp_path / "there" / "bundle"
    build([*options, "--out", str(here)])
    pack_bundle(here, tmp_path / "bundle.tar.xz")
    unpack(tmp_path / "bundle.tar.xz", there)
    assert not (there / "weights").exists()
    with pytest.raises(BundleError, match="weights"):
        Bundle.open(there)
    (package,) = there.rglob("*.pt2")
    before = (package.stat().st_mtime_ns, package.read_bytes())
    build([*options, "--out", str(there)])
    assert (package.stat().st_mtime_ns, package.read_bytes()) == before
    whole, completed = Bundle.open(here), Bundle.open(there)
    assert completed.manifest.files == whole.manifest.files
    completed.verify(completed.manifest.files)


def test_nothing_was_carried(tmp_path):
    unpack(tmp_path / "bundle.tar.xz", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["no archive", "another folder"])
def test_an_archive_that_is_no_bundle(content, tmp_path):
    archive = tmp_path / "bundle.tar.xz"
    if content == "no archive":
        archive.write_bytes(b"x" * 100)
    else:
        with tarfile.open(archive, "w:xz") as files:
            files.add(__file__, "other/file")
    with pytest.raises(MomaError, match="cannot be unpacked as a bundle"):
        unpack(archive, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def carried(tmp_path):
    """An archive of a folder with a manifest."""
    (tmp_path / "manifest.json").write_text("carried")
    with tarfile.open(tmp_path / "bundle.tar.xz", "w:xz") as files:
        files.add(tmp_path / "manifest.json", "bundle/manifest.json")
    return tmp_path / "bundle.tar.xz"


def test_leftovers_of_an_interrupted_build_are_replaced(carried, tmp_path):
    there = tmp_path / "work" / "bundle"
    for name in ("networks/.partial-1/x", "engines/denoiser-1/engine.pt2", ".lock", "../.partial-bundle/bundle/stale"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).touch()
    unpack(carried, there)
    assert [path.name for path in there.iterdir()] == ["manifest.json"]
    assert [path.name for path in there.parent.iterdir()] == ["bundle"]


def test_a_folder_with_other_files_is_not_replaced(carried, tmp_path):
    there = tmp_path / "work" / "bundle"
    (there / "networks").mkdir(parents=True)
    (there / "thesis.txt").write_text("mine")
    with pytest.raises(MomaError, match=r"bundle is not a bundle: it holds thesis.txt; move it"):
        unpack(carried, there)
    assert (there / "thesis.txt").read_text() == "mine"


def engine(version, flavour=Flavour.INDUCTOR):
    return SimpleNamespace(flavour=flavour, version=version)


def test_engines_of_another_version_are_refused_at_once():
    check_engines(SimpleNamespace(engines=[engine("1.0"), engine(torch.__version__)]))
    said = rf"those of inductor are from version 1\.0, here is {re.escape(torch.__version__)}; build it with"
    with pytest.raises(MomaError, match=said):
        check_engines(SimpleNamespace(engines=[engine("1.0"), engine("1.0")]))


PARENT = """
import sys
from benchmarks.gpu.prepare import run
run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60); print('left')"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_child_process_ends_with_its_parent(repository):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    # The pipe closes when the last process that holds it ends: this read returns only if the child has ended.
    assert parent.stdout.read() == ""
    parent.wait()
    parent.stdout.close()


def test_a_bundle_without_engines_is_not_packed(tiny_bundle, tmp_path):
    with pytest.raises(InputError, match="has no engines: build it with --target inductor:smNN"):
        pack_bundle(tiny_bundle, tmp_path / "x.tar.xz")
    with pytest.raises(BundleError):
        pack_bundle(tmp_path, tmp_path / "x.tar.xz")
    assert not (tmp_path / "x.tar.xz").exists()


def test_a_random_subject_fits_its_bundle(small_bundles, tmp_path, on_a_cpu):
    bundle = Bundle.open(small_bundles[1])
    subject = random_subject(bundle)
    subject.save(tmp_path / "cup.subject")
    loaded = Subject.load(tmp_path / "cup.subject")
    loaded.check(bundle)
    assert all(count == round(0.4 * grid * grid) for grid, count in loaded.token_counts().items())
    assert loaded.identity == random_subject(bundle).identity
    width = bundle.manifest.geometry.embedding_width
    embedding = prepare.np.ones(width, prepare.np.float32)
    runtime = Runtime.load(small_bundles[1], "inductor")
    assert runtime.generate(loaded, "A coffee cup.", steps=1, context_embedding=embedding).images


def test_each_part_is_timed_and_a_failing_build_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOMA_RT_RESULTS", str(tmp_path / "out"))
    (tmp_path / "carried").mkdir()
    places = ["--carried", tmp_path / "carried", "--work", tmp_path / "work", "--bundle", tmp_path / "bundle"]
    assert main([*map(str, places), "--", "--base", "nowhere"]) == 2
    assert "-m export.build --base ended with 2" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert list(found["seconds"]) == ["wheels", "parts", "unpacking"]
    assert found["complete"] is False
