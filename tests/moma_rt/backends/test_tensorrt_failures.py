"""What a TensorRT backend refuses, and how it reports failures of CUDA and of TensorRT."""

import gc
import importlib.util
import sys

import numpy as np
import pytest

from moma_rt import backends
from moma_rt.backends.cuda import Stream
from moma_rt.backends.device import local_device
from moma_rt.backends.tensorrt import TensorRtBackend
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.specs import NetworkSpec, TensorSpec
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory
from tests.moma_rt.backends.networks import BATCH, PAST, STEP, allocate, buffer_of
from tests.moma_rt.fake_cuda import CudaError, FakeCuda
from tests.moma_rt.fake_gpu import FakeGpu


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (NetworkSpec("step", STEP.inputs[:2], STEP.outputs), "its inputs differ from the manifest's: missing [], un"),
        (
            NetworkSpec("step", STEP.inputs, PAST.outputs),
            "its outputs differ from the manifest's: missing ['kv float32', ",
        ),
        (
            NetworkSpec("step", (TensorSpec("x", "float16", (BATCH, 3)), *STEP.inputs[1:]), STEP.outputs),
            "missing ['x float16'], unexpected ['x float32']",
        ),
        (NetworkSpec("step", STEP.outputs, STEP.inputs), "its inputs differ from the manifest's"),
    ],
)
def test_an_engine_with_other_tensors_than_the_manifest_is_refused(load, spec, said):
    _, network = load
    with pytest.raises(BundleError) as caught:
        network(spec)
    assert said in str(caught.value)


def test_a_file_that_is_no_engine_is_one_line(load, tmp_path):
    backend, _ = load
    path = tmp_path / "engine.trt"
    path.write_bytes(b"junk")
    with pytest.raises(BundleError) as caught:
        backend.load(STEP, path)
    assert str(caught.value) == (
        f"{path}: tensorrt 11.4.0 cannot load it: IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic)"
    )
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="is not an engine: it is empty"):
        backend.load(STEP, path)


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        (
            "create_execution_context",
            MomaError,
            "step: tensorrt 11.4.0 has too little memory to run it: create_execution_context",
        ),
        ("set_input_shape", BundleError, "step: its engine does not accept x of shape [1, 3]: set_input_shape: Er"),
        ("set_tensor_address", BundleError, "step: its engine does not accept the address of x: set_tensor_address: "),
        (
            "execute_async_v3",
            MomaError,
            "step: tensorrt 11.4.0 cannot run it: execute_async_v3: Error Code 3 (no reaso",
        ),
    ],
)
def test_what_the_library_refuses_is_one_line_with_its_reason(gpu, load, method, kind, said):
    backend, network = load
    loaded, buffers = network(STEP), allocate(backend, STEP, batch=1)
    bound = loaded.bind(buffers)
    gpu.trt.logger.log(gpu.trt.ILogger.Severity.ERROR, "of something else, before")
    gpu.trt.refusals.add(method)
    with pytest.raises(kind) as caught:
        bound.enqueue() if method == "execute_async_v3" else loaded.bind(buffers)
    assert str(caught.value).startswith(said)
    loaded.bind(buffers).enqueue()
    assert not backend.download(buffers["next_x"]).any()


@pytest.mark.parametrize("method", ["deserialize_cuda_engine", "create_execution_context", "execute_async_v3"])
@pytest.mark.parametrize("reason", ["OutOfMemory: no 7 bytes on GPU 0", "Cuda failure: out of memory"])
def test_a_library_that_runs_out_of_memory(gpu, load, method, reason):
    backend, network = load
    gpu.trt.reason = reason
    gpu.trt.refusals.add(method)
    with pytest.raises(OutOfMemory) as caught:
        network(STEP).bind(allocate(backend, STEP, batch=1)).enqueue()
    assert str(caught.value).endswith(f"{method}: Error Code 3 ({reason})")
    network(STEP).bind(allocate(backend, STEP, batch=1)).enqueue()


def use_everything(backend, network):
    """Make every CUDA call that a backend makes: allocate `STEP`'s buffers, upload, run, wait and download."""
    buffers = allocate(backend, STEP, batch=4096)
    backend.upload(buffers["ids"], np.ones((4096, 3), np.int32))
    network(STEP).bind(buffers).enqueue()
    backend.synchronize()
    assert (backend.download(buffers["next_x"]) == 1).all()


@pytest.mark.parametrize(
    "call",
    [
        "cudaMalloc",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaHostAlloc",
        "cudaEventCreateWithFlags",
    ],
)
def test_a_failing_call_is_named_and_the_next_one_works(gpu, load, call):
    backend, network = load
    gpu.cuda.failures[call] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(MomaError, match=rf"^{call}( of \d+ bytes)? failed: cudaErrorIllegalAddress$"):
        use_everything(backend, network)
    use_everything(backend, network)


def test_a_device_that_cannot_be_used(gpu):
    gpu.cuda.failures["cudaStreamCreateWithFlags"] = CudaError.cudaErrorInsufficientDriver
    with pytest.raises(MomaError) as caught:
        TensorRtBackend(Flavour.TENSORRT)
    assert str(caught.value) == (
        "cudaStreamCreateWithFlags failed: cudaErrorInsufficientDriver; cuda-bindings is newer than the driver: update "
        "the driver, or install an older cuda-bindings"
    )


def test_a_library_that_is_too_new_for_the_driver(gpu):
    gpu.trt.refusals.add("Runtime")
    with pytest.raises(MomaError) as caught:
        TensorRtBackend(Flavour.TENSORRT)
    assert str(caught.value) == "tensorrt 11.4.0 cannot use this GPU: Runtime: Error Code 3 (no reason)"


def test_a_failed_free_is_no_error(gpu, load):
    backend, _ = load
    buffer = buffer_of(backend, (3,), "float32")
    backend.synchronize()
    (address,) = gpu.cuda.memory
    gpu.cuda.failures["cudaFree"] = CudaError.cudaErrorIllegalAddress
    del buffer
    gc.collect()
    assert gpu.cuda.failures == {}
    gpu.cuda.cudaFree(address)


def test_out_of_memory_says_how_much_was_asked_for_and_leaves_the_backend_usable(gpu, load):
    backend, network = load
    with pytest.raises(MomaError) as caught:
        buffer_of(backend, (1 << 20, 17), "float32")
    assert str(caught.value) == (
        "cudaMalloc of 71303168 bytes failed: cudaErrorMemoryAllocation; close other programs on the GPU, or "
        "generate fewer pictures at a time"
    )
    use_everything(backend, network)


def test_smaller_networks_still_run_after_the_scratch_region_could_not_grow(gpu, load):
    backend, network = load
    loaded, small, large = network(STEP), allocate(backend, STEP, batch=4), allocate(backend, STEP, batch=1 << 18)
    bound = loaded.bind(small)
    bound.enqueue()
    gpu.cuda.capacity = gpu.cuda.used + 4096
    with pytest.raises(MomaError, match="cudaMalloc of 3145730 bytes failed: cudaErrorMemoryAllocation"):
        loaded.bind(large)
    backend.upload(small["ids"], np.ones((4, 3), np.int32))
    bound.enqueue()
    assert (backend.download(small["next_x"]) == 1).all()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "cuda.bindings.runtime",
            r"the Python package cuda.bindings.runtime is not installed \(.*\): pip install cuda-b",
        ),
        ("tensorrt", r"the Python package tensorrt is not installed \(.*\): pip install tensorrt$"),
    ],
)
def test_a_missing_package_is_named(gpu, monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=said) as caught:
        backends.create("tensorrt")
    assert "\n" not in str(caught.value)


def test_auto_cannot_be_created():
    with pytest.raises(
        InputError, match="auto depends on the bundle; name one of: onnxruntime, onnxruntime_cuda, tens"
    ):
        backends.create("auto")


def test_the_fake_cuda_has_only_what_the_real_one_has():
    real = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in dir(FakeCuda) if name.startswith("cuda")]
    assert "cudaMemcpyAsync" in names
    assert [name for name in names if not hasattr(real, name)] == []
    for constant in ("cudaStreamNonBlocking", "cudaHostAllocDefault", "cudaEventDisableTiming"):
        assert getattr(real, constant) == getattr(FakeCuda, constant)
    for kind in ("cudaError_t", "cudaMemcpyKind"):
        for member in getattr(FakeCuda, kind):
            found = getattr(getattr(real, kind), member.name)
            assert (found.name, int(found)) == (member.name, member.value)


def test_cuda_itself_says_that_there_is_no_device():
    pytest.importorskip("cuda.bindings.runtime")
    if local_device() is not None:
        pytest.skip("there is one")
    with pytest.raises(
        MomaError, match="^cudaStreamCreateWithFlags failed: (cudaError(InsufficientDriver|NoDevice)|.*libcuda)"
    ):
        Stream()


@pytest.mark.tensorrt
def test_the_library_itself_says_why_it_loads_no_junk(monkeypatch, tmp_path):
    """The installed library, on a fake device."""
    flavour = next(f for f in Flavour if importlib.util.find_spec(f.value) is not None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeGpu.install(monkeypatch, {}, "unused").cuda)
    (tmp_path / "engine.trt").write_bytes(b"junk" * 100)
    # On a machine without a driver TensorRT may not even start; TensorRT-RTX does.
    said = (
        rf"engine.trt: {flavour.value} [\d.]+ cannot load it: .*rializ|{flavour.value} [\d.]+ cannot use this GPU: \w"
    )
    with pytest.raises(MomaError, match=said) as caught:
        TensorRtBackend(flavour).load(STEP, tmp_path / "engine.trt")
    assert "\n" not in str(caught.value)
