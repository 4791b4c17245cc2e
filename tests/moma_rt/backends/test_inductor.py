"""The inductor backend on packages of a few operations."""

import dataclasses
import errno
import gc
import json
import shutil
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moma_rt import backends
from moma_rt.backends.device import local_device
from moma_rt.backends.inductor import TENSORS_NOTE, InductorBackend
from moma_rt.bundle.engines import Device
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory
from tests.moma_rt.backends.networks import PAST, STEP, allocate, buffer_of, check_row_filling, check_two_bindings
from tests.moma_rt.backends.packages import save_package, with_code, with_notes


@pytest.fixture(scope="module")
def step_package(tmp_path_factory):
    return save_package(tmp_path_factory.mktemp("packages") / "step.pt2", STEP)


@pytest.fixture(scope="module")
def past_package(tmp_path_factory):
    return save_package(tmp_path_factory.mktemp("packages") / "past.pt2", PAST)


@pytest.fixture
def backend():
    return InductorBackend(None)


def test_two_bindings_of_one_network_read_each_others_output(backend, step_package):
    check_two_bindings(backend, backend.load(STEP, step_package))


def test_a_run_writes_into_the_bound_memory(backend, step_package):
    buffers = allocate(backend, STEP, batch=1)
    address = buffers["next_x"].tensor.data_ptr()
    bound = backend.load(STEP, step_package).bind(buffers)
    for value in (1, 2):
        backend.upload(buffers["x"], np.full((1, 3), value, np.float32))
        bound.enqueue()
        assert (backend.download(buffers["next_x"]) == value).all()
    assert buffers["next_x"].tensor.data_ptr() == address


def test_a_binding_keeps_its_network_and_its_buffers_alive(backend, step_package):
    kept = buffer_of(backend, (2, 3), "float32")
    bound = backend.load(STEP, step_package).bind({**allocate(backend, STEP, batch=2), "next_x": kept})
    backend.upload(kept, np.ones((2, 3), np.float32))
    gc.collect()
    filler = [torch.full((2, 3), torch.nan) for _ in range(100)]
    bound.enqueue()
    np.testing.assert_array_equal(backend.download(kept), np.zeros((2, 3)))
    assert len(filler) == 100


@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 2), (1, 1), (3, 9)])
def test_sizes_that_tracing_would_take_for_constants(backend, past_package, past, new):
    buffers = allocate(backend, PAST, past=past, s=new)
    backend.upload(buffers["past"], np.ones((2, past), np.float32))
    backend.upload(buffers["new"], np.full((2, new), 3, np.float32))
    backend.load(PAST, past_package).bind(buffers).enqueue()
    assert backend.download(buffers["total"]) == 2 * (past + 3 * new)
    np.testing.assert_array_equal(backend.download(buffers["kv"]), np.full((2, new), 6))


def test_rows_of_a_table(backend):
    table, row = buffer_of(backend, (3, 2), "float32"), buffer_of(backend, (2,), "float32")
    backend.upload(table, np.arange(6).reshape(3, 2).astype(np.float64))
    backend.upload(table, np.array([7, 8], np.float32), row=1)
    for index, expected in enumerate(([0, 1], [7, 8], [4, 5])):
        backend.copy_row(table, index, row)
        assert backend.download(row).tolist() == expected


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_row_is_filled_up_with_zeros(backend, count):
    check_row_filling(backend, count)


def test_uploads_and_downloads_are_copies(backend):
    buffer, array = buffer_of(backend, (3,), "float32"), np.ones(3, np.float32)
    before = backend.download(buffer)
    backend.upload(buffer, array)
    array[:] = 2
    assert not before.any()
    assert (backend.download(buffer) == 1).all()


def test_uploads_convert_between_floats_and_refuse_everything_else(backend):
    buffer = buffer_of(backend, (2, 3), "float16")
    backend.upload(buffer, np.full((2, 3), 0.5, np.float64))
    assert backend.download(buffer).dtype == np.float16
    assert (backend.download(buffer) == 0.5).all()
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit a buffer of shape \(2, 3\)"):
        backend.upload(buffer, np.zeros(3, np.float32))
    with pytest.raises(TypeError):
        backend.upload(buffer_of(backend, (1,), "int32"), np.ones(1, np.float32))


def test_buffers_of_another_backend_are_refused(backend, step_package):
    with pytest.raises(TypeError, match="a ndarray is not a buffer of the inductor backend"):
        backend.load(STEP, step_package).bind({"x": np.zeros((1, 3))})


def test_a_cpu_captures_nothing(backend):
    assert not backend.supports_capture
    assert backend.capture(lambda: pytest.fail("a CPU has nothing to capture")) is None
    backend.synchronize()
    backend.trim()


@pytest.mark.parametrize("content", [b"", b"not a package", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_package_is_one_line(backend, tmp_path, content):
    path = tmp_path / "engine.pt2"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"engine\.pt2 is not an inductor package: \w+") as caught:
        backend.load(STEP, path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder of this process's temporary files, with none in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_loaded_package_leaves_no_temporary_file(backend, step_package, temporary):
    network = backend.load(STEP, step_package)
    assert list(temporary.iterdir()) == []
    check_two_bindings(backend, network)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"\x7fELF" + bytes(4096), r"engine\.pt2: PyTorch [\w.+]+ cannot load it: \w"),
        (b"", r"engine\.pt2: PyTorch [\w.+]+ cannot load it: \w"),
        (None, r"engine\.pt2 is not an inductor package: StopIteration"),
    ],
    ids=["broken", "empty", "none"],
)
def test_a_package_whose_code_cannot_be_loaded_is_one_line(backend, step_package, tmp_path, temporary, code, said):
    path = with_code(step_package, tmp_path / "engine.pt2", code)
    with pytest.raises(BundleError, match=said) as caught:
        backend.load(STEP, path)
    assert "\n" not in str(caught.value)
    assert list(temporary.iterdir()) == []


def test_a_package_that_was_cut_in_the_middle_is_one_line(backend, step_package, tmp_path, temporary):
    path = tmp_path / "engine.pt2"
    content = step_package.read_bytes()
    start = content.index(b"\x7fELF")
    path.write_bytes(content[:start] + bytes(4096) + content[start + 4096 :])
    with pytest.raises(BundleError, match=r"engine\.pt2 is not an inductor package: Bad CRC-32"):
        backend.load(STEP, path)
    assert list(temporary.iterdir()) == []


def test_a_full_disk_is_named(backend, step_package, temporary, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(BundleError, match=r"step\.pt2 cannot be unpacked: No space left on device$"):
        backend.load(STEP, step_package)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"AOTI_DEVICE_KEY": "cuda"}, "was compiled for cuda, and this backend runs on cpu"),
        ({"AOTI_DEVICE_KEY": None}, "was compiled for None, and this backend runs on cpu"),
        ({"AOTI_CPU_ISA": "AVX9000 X"}, r"was compiled for a CPU with AVX9000, and PyTorch uses \w+ on this one"),
        ({"AOTI_MACHINE": "riscv64"}, r"was compiled for hosts of riscv64, and this one is \w+"),
        ({TENSORS_NOTE: None}, "does not say what its inputs and outputs are; build it again"),
        ({TENSORS_NOTE: "[]"}, "does not say what its inputs and outputs are; build it again"),
        (
            {TENSORS_NOTE: json.dumps({"inputs": ["x float32"], "outputs": []})},
            r"its inputs differ from the manifest's: missing \['ids int32', 'y float32'\], unexpected \[\]",
        ),
    ],
)
def test_a_package_of_something_else_is_refused_before_its_code_is_loaded(
    backend, step_package, tmp_path, monkeypatch, notes, said
):
    monkeypatch.setattr(InductorBackend, "_runner", lambda *_: pytest.fail("it was loaded"))
    path = with_notes(step_package, tmp_path / "engine.pt2", **notes)
    with pytest.raises(BundleError, match=said) as caught:
        backend.load(STEP, path)
    assert str(path) in str(caught.value)


def test_the_package_of_another_network_is_refused(backend, past_package):
    with pytest.raises(BundleError, match="past.pt2: its inputs differ from the manifest's"):
        backend.load(STEP, past_package)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("a kernel\nfailed"), MomaError, "a kernel failed"),
        (torch.OutOfMemoryError("tried to allocate"), OutOfMemory, "no memory left: tried to allocate; close o"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory, "no memory left: Default"),
    ],
)
def test_a_run_that_fails_is_one_line_and_the_next_one_works(backend, step_package, error, kind, said):
    network, buffers = backend.load(STEP, step_package), allocate(backend, STEP, batch=2)

    def fail(_):
        raise error

    broken = dataclasses.replace(network, runner=SimpleNamespace(run=fail))
    with pytest.raises(MomaError) as caught:
        broken.bind(buffers).enqueue()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"step: PyTorch {torch.__version__} cannot run it: {said}")
    network.bind(buffers).enqueue()


def test_out_of_memory_on_a_cpu(backend):
    with pytest.raises(OutOfMemory, match=r"a buffer of float32 \[1099511627776, 1024\]: no memory left: "):
        buffer_of(backend, (1 << 40, 1024), "float32")


def test_threads_are_those_of_the_process():
    before = torch.get_num_threads()
    try:
        InductorBackend(None, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_gpu_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "local_device", lambda: Device("H100", 90))
    with pytest.raises(MomaError, match=r"^PyTorch [\w.+]+ cannot use H100: install a build that supports it$"):
        backends.create("inductor")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"^the Python package torch is not installed \(.*\): pip install torch$"):
        backends.create("inductor")


@pytest.mark.gpu
def test_on_a_gpu_two_bindings_read_each_others_output(tmp_path):
    backend = InductorBackend(local_device())
    check_two_bindings(backend, backend.load(STEP, save_package(tmp_path / "step.pt2", STEP, "cuda")))


@pytest.mark.gpu
def test_on_a_gpu_out_of_memory_is_raised():
    backend = InductorBackend(local_device())
    with pytest.raises(OutOfMemory, match="no memory left"):
        buffer_of(backend, (1 << 40,), "float32")
    assert not backend.download(buffer_of(backend, (3,), "float32")).any()
