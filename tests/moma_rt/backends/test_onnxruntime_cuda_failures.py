"""What the ONNX Runtime CUDA backend refuses, and how it reports failures."""

import gc
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from moma_rt import backends
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory
from tests.moma_rt.backends.networks import PAST, STEP, allocate, save_graph
from tests.moma_rt.fake_cuda import CudaError, FakeCuda
from tests.moma_rt.fake_onnxruntime import FakeOnnxRuntime

INSTALLATION = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31'"


@pytest.fixture
def gpu(monkeypatch):
    cuda = FakeCuda(1 << 26)
    yield SimpleNamespace(cuda=cuda, ort=FakeOnnxRuntime.install(monkeypatch, cuda))
    assert cuda.wrong == []


@pytest.fixture
def create(gpu):
    return lambda: backends.create("onnxruntime_cuda")


@pytest.fixture
def step_onnx(tmp_path):
    return save_graph(tmp_path / "step.onnx", STEP)


def said_by(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_session_that_would_run_on_the_cpu_is_refused(gpu, create, step_onnx, capfd):
    gpu.ort.loads_provider = False
    assert said_by(lambda: create().load(STEP, step_onnx), InputError) == (
        "backend onnxruntime_cuda: ONNX Runtime 1.31.1 would run step on the CPU, because its CUDA provider cannot be "
        "loaded (Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file): " + INSTALLATION
    )
    assert capfd.readouterr() == ("", "")


def test_a_network_whose_work_is_left_to_the_cpu_is_refused(gpu, create, step_onnx):
    gpu.ort.on_cpu = ("Squeeze", "Conv", "Attention", "Conv")
    assert said_by(lambda: create().load(STEP, step_onnx), BundleError) == (
        f"{step_onnx}: ONNX Runtime 1.31.1 has no GPU kernels of Attention, Conv for this network's dtypes"
    )


def test_an_onnxruntime_for_cpus(gpu, create):
    gpu.ort.providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    assert said_by(create, InputError) == f"the installed onnxruntime 1.31.1 is for CPUs only: {INSTALLATION}"
    assert backends.create("onnxruntime").name == "onnxruntime"


@pytest.mark.parametrize("version", ["1.30.0", "1.9", "0.31.1"])
def test_an_onnxruntime_that_is_too_old(gpu, create, version):
    gpu.ort.__version__ = version
    assert said_by(create, InputError) == f"onnxruntime-gpu {version} is too old: {INSTALLATION}"


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime_cuda"])
def test_an_onnxruntime_that_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = said_by(lambda: backends.create(name), InputError)
    assert said.startswith("the Python package onnxruntime is not installed (")
    assert said.endswith("): pip install onnxruntime")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime_cuda"])
def test_an_onnxruntime_with_missing_parts(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    assert said_by(lambda: backends.create(name), InputError) == (
        "parts of the Python package onnxruntime are missing: pip uninstall onnxruntime onnxruntime-gpu, then pip "
        "install one of them"
    )


def test_a_missing_cuda_package(gpu, create, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert said_by(create, InputError).endswith(": pip install cuda-bindings")


def test_a_device_that_cannot_be_used(gpu, create):
    gpu.cuda.failures["cudaStreamCreateWithFlags"] = CudaError.cudaErrorInsufficientDriver
    assert said_by(create, MomaError).startswith("cudaStreamCreateWithFlags failed: cudaErrorInsufficientDriver; ")


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_file_that_is_no_graph(create, tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    said = said_by(lambda: create().load(STEP, tmp_path / "model.onnx"), BundleError)
    assert said.startswith(f"{tmp_path}/model.onnx: ONNX Runtime 1.31.1 cannot load it: ")


def test_a_graph_with_other_tensors_than_the_manifest(gpu, create, step_onnx):
    spec = NetworkSpec("step", STEP.inputs, PAST.outputs)
    assert "its outputs differ from the manifest's: missing ['kv', " in said_by(
        lambda: create().load(spec, step_onnx), BundleError
    )
    gc.collect()
    assert gpu.cuda.memory == {}


def test_buffers_of_another_backend(create, step_onnx):
    with pytest.raises(TypeError, match="a ndarray is not a buffer in a GPU's memory"):
        create().load(STEP, step_onnx).bind({"x": np.zeros((1, 3))})


def test_out_of_memory_while_a_network_is_loaded(gpu, create, step_onnx):
    backend = create()
    gpu.cuda.capacity = 100
    said = said_by(lambda: backend.load(STEP, step_onnx), OutOfMemory)
    assert said.startswith(
        f"{step_onnx}: ONNX Runtime 1.31.1 cannot load it: Failed to allocate memory for requested buffer of size "
    )
    assert said.endswith("; close other programs on the device, or generate fewer pictures at a time")
    gpu.cuda.capacity = 1 << 26
    assert backend.load(STEP, step_onnx)


def test_out_of_memory_in_a_run_leaves_the_backend_usable(gpu, create, step_onnx):
    backend = create()
    network = backend.load(STEP, step_onnx)
    small, large = (allocate(backend, STEP, batch=batch) for batch in (2, 10_000))
    fits, does_not_fit = network.bind(small), network.bind(large)
    gpu.cuda.capacity = gpu.cuda.used + 10_000
    fits.enqueue()
    said = said_by(does_not_fit.enqueue, OutOfMemory)
    assert said.startswith("step: ONNX Runtime 1.31.1 cannot run it: Failed to allocate memory for requested buffer of")
    backend.upload(small["ids"], np.ones((2, 3), np.int32))
    fits.enqueue()
    assert (backend.download(small["next_x"]) == 1).all()


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; file=x.cc", OutOfMemory, "out of memory; close other"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", OutOfMemory, "CUBLAS_STATUS_ALLOC_FAILED; close"),
        ("std::bad_alloc", OutOfMemory, "bad_alloc; close other programs"),
        ("Non-zero status code\nwhile running X.", MomaError, "Non-zero status code while running X."),
    ],
)
def test_an_error_of_a_run_is_one_line(gpu, create, step_onnx, text, kind, said):
    backend = create()
    bound = backend.load(STEP, step_onnx).bind(allocate(backend, STEP, batch=1))
    # Out of memory is raised twice: the run is retried after other networks have freed their arenas.
    gpu.ort.failures += [RuntimeError(text)] * 2
    found = said_by(bound.enqueue, kind)
    assert found.startswith(f"step: ONNX Runtime 1.31.1 cannot run it: {said}")
    assert (type(found), kind is OutOfMemory) == (str, len(gpu.ort.failures) == 0)


def test_an_error_of_another_type_is_not_caught(gpu, create, step_onnx):
    backend = create()
    bound = backend.load(STEP, step_onnx).bind(allocate(backend, STEP, batch=1))
    for call in (bound.enqueue, lambda: backend.load(STEP, step_onnx)):
        gpu.ort.failures.append(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            call()
