"""The cache of kernels that TensorRT-RTX compiles on the device, for the next process; on a fake GPU."""

import pytest

from moma_rt import backends
from tests.moma_rt.backends.networks import STEP, allocate, step
from tests.moma_rt.fake_gpu import FakeGpu
from tests.moma_rt.fake_jit import RuntimeCache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moma-rt" / "tensorrt_rtx"


@pytest.fixture
def run(tmp_path, monkeypatch, home):
    """Run a network on some batch sizes, as a process of its own would; returns how many were compiled."""
    engine = tmp_path / "engines" / "step-0123456789abcdef" / "engine.trt"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"step")

    def process(*batches, flavour="tensorrt_rtx"):
        gpu = FakeGpu.install(monkeypatch, {b"step": (STEP, step)}, flavour)
        backend = backends.create(flavour)
        network = backend.load(STEP, engine)
        for batch in batches:
            buffers = allocate(backend, STEP, batch=batch)
            bound = network.bind(buffers)
            for _ in range(2):
                bound.enqueue()
            backend.download(buffers["next_x"])
        assert gpu.cuda.wrong == []
        return None if network.jit is None else network.jit.runtime_config.cache.compiled

    return process


def files(home):
    return {path.name: path.read_bytes() for path in home.iterdir()} if home.is_dir() else {}


def test_what_was_compiled_is_not_compiled_again(run, home):
    assert run(1, 2) == 2
    kept = files(home)
    assert kept.keys() == {"step-0123456789abcdef.cache"}
    assert run(1, 2) == 0
    assert files(home) == kept
    assert run(2, 3) == 1
    assert run(1, 2, 3) == 0


@pytest.fixture
def bound(tmp_path, monkeypatch, home):
    """A backend and a network of it that has not run yet."""
    FakeGpu.install(monkeypatch, {b"step": (STEP, step)}, "tensorrt_rtx")
    backend = backends.create("tensorrt_rtx")
    (tmp_path / "engine.trt").write_bytes(b"step")
    return backend, backend.load(STEP, tmp_path / "engine.trt").bind(allocate(backend, STEP, batch=1))


@pytest.mark.parametrize("wait", ["synchronize", "trim"])
def test_waiting_saves_what_was_compiled(bound, home, wait):
    backend, network = bound
    network.enqueue()
    assert files(home) == {}
    getattr(backend, wait)()
    assert len(files(home)) == 1


def test_the_cache_is_saved_once_per_binding(bound, monkeypatch):
    """Not at every wait: it is tens of megabytes."""
    backend, network = bound
    saved = []
    monkeypatch.setattr("moma_rt.backends.jit.JitCache.save", lambda jit: saved.append(jit))
    for _ in range(3):
        network.enqueue()
        backend.synchronize()
    assert len(saved) == 1


def test_a_cache_file_that_does_not_fit_is_replaced(run, home):
    home.mkdir(parents=True)
    place = home / "step-0123456789abcdef.cache"
    for content in (b"", b"compiled by 10.0 for another device\nx", b"\xff\xfe"):
        place.write_bytes(content)
        assert run(1) == 1
        assert place.read_bytes().startswith(RuntimeCache.HEADER.encode())


def test_nothing_is_written_where_nothing_ran(run, home):
    assert run() == 0
    assert files(home) == {}


def test_a_folder_that_cannot_be_written_is_no_error(run, home):
    home.parent.mkdir(parents=True)
    home.write_text("a file in its place")
    assert run(1) == 1
    assert run(1) == 1


def test_a_cache_that_cannot_be_serialized_is_no_error(run, home, monkeypatch):
    run(1)
    kept = files(home)
    monkeypatch.setattr(RuntimeCache, "serialize", lambda _: None)
    assert run(1, 2) == 1
    assert files(home) == kept


def test_a_relative_cache_folder_does_not_count(run, monkeypatch, tmp_path):
    """It would be another one after the process has changed its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(1) == 1
    assert not (tmp_path / "cache").exists()
    assert list((tmp_path / "home" / ".cache" / "moma-rt").rglob("*.cache"))


def test_without_a_home_nothing_is_kept(run, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert run(1) == 1
    assert run(1) == 1


def test_tensorrt_itself_compiles_nothing_here(run, home):
    assert run(1, flavour="tensorrt") is None
    assert files(home) == {}


@pytest.mark.parametrize(("flavour", "refuses"), [("tensorrt_rtx", False), ("tensorrt_rtx", True), ("tensorrt", True)])
def test_rtx_is_asked_whether_it_can_be_captured(tmp_path, monkeypatch, home, flavour, refuses):
    """TensorRT itself is not asked: it has no such method."""
    gpu = FakeGpu.install(monkeypatch, {b"step": (STEP, step)}, flavour)
    gpu.trt.refusals |= {"is_stream_capturable"} if refuses else set()
    backend = backends.create(flavour)
    (tmp_path / "engine.trt").write_bytes(b"step")
    bound = backend.load(STEP, tmp_path / "engine.trt").bind(allocate(backend, STEP, batch=1))
    for _ in range(2):
        bound.enqueue()
    backend.synchronize()
    graph = backend.capture(bound.enqueue)
    assert (graph is None) == (refuses and flavour == "tensorrt_rtx")
    bound.enqueue()
    backend.synchronize()
