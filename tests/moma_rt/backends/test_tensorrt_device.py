"""Real engines on a real GPU, and ONNX Runtime's graphs, against the NumPy functions that the fake GPU runs."""

import importlib.util

import numpy as np
import pytest

from engines.tensorrt import ENGINE_NAME, EngineRequest, build_engine
from moma_rt.backends.device import local_device
from moma_rt.backends.onnxruntime import OnnxRuntimeBackend
from moma_rt.backends.tensorrt import TensorRtBackend
from moma_rt.bundle.engines import RTX_CAPABILITIES, Flavour
from moma_rt.memory.networks import run_once
from tests.moma_rt.backends.networks import PAST, STEP, allocate, buffer_of, past, save_graph, step

CASES = [
    (STEP, step, ({"batch": 2}, {"batch": 500})),
    (PAST, past, ({"past": 0, "s": 2}, {"past": 3, "s": 2})),
]


def random_inputs(spec, **sizes):
    """Whole numbers, so that no order of additions changes a result."""
    rng = np.random.default_rng(0)
    return {t.name: rng.integers(0, 200, t.resolve(**sizes)).astype(t.dtype) for t in spec.inputs}


@pytest.mark.parametrize(("spec", "function", "sizes"), CASES)
def test_the_graphs_compute_what_the_functions_do(tmp_path, spec, function, sizes):
    backend = OnnxRuntimeBackend(threads=1)
    network = backend.load(spec, save_graph(tmp_path / "model.onnx", spec))
    for inputs in (random_inputs(spec, **s) for s in sizes):
        found, expected = run_once(backend, network, inputs), function(inputs)
        assert found.keys() == expected.keys()
        for name, output in expected.items():
            np.testing.assert_array_equal(found[name], output)


def build_here(folder, spec):
    """A backend of this machine's GPU and an engine of the network."""
    device = local_device()
    installed = [f for f in Flavour if importlib.util.find_spec(f.value) is not None]
    is_valid = [f for f in installed if f is Flavour.TENSORRT or device.capability in RTX_CAPABILITIES]
    if not is_valid:
        pytest.skip(f"{installed[0].value} builds no engines for {device.name}")
    graph = save_graph(folder / "model.onnx", spec)
    build_engine(EngineRequest(is_valid[0], (device.capability,), graph, folder, spec), folder, lambda _: None)
    backend = TensorRtBackend(is_valid[0])
    return backend, backend.load(spec, folder / ENGINE_NAME)


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize(("spec", "function", "sizes"), CASES)
def test_an_engine_runs_at_two_alternating_sizes(tmp_path, spec, function, sizes):
    backend, network = build_here(tmp_path, spec)
    for inputs in [random_inputs(spec, **s) for s in sizes] * 2:
        found = run_once(backend, network, inputs)
        for name, output in function(inputs).items():
            np.testing.assert_array_equal(found[name], output)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_two_bindings_of_one_engine_read_each_others_output(tmp_path):
    backend, network = build_here(tmp_path, STEP)
    even = allocate(backend, STEP, batch=2)
    steps = [network.bind(even), network.bind({**even, "x": even["next_x"], "next_x": even["x"]})]
    for i in range(10):
        backend.upload(even["ids"], np.full((2, 3), i, np.int32))
        steps[i % 2].enqueue()
    assert (backend.download(even["x"]) == sum(range(10))).all()
    with pytest.raises(Exception, match="cudaErrorMemoryAllocation"):
        buffer_of(backend, (1 << 24, 1 << 20), "float32")
    steps[0].enqueue()
    assert (backend.download(even["next_x"]) == sum(range(11)) - 1).all()
