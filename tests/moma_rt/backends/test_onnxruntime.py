"""The ONNX Runtime backend on graphs of a few nodes."""

import gc
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moma_rt import backends
from moma_rt.backends.onnxruntime import OnnxRuntimeBackend
from moma_rt.bundle.specs import NetworkSpec, TensorSpec
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory
from tests.moma_rt.backends.networks import (
    PAST,
    STEP,
    allocate,
    buffer_of,
    check_row_filling,
    check_two_bindings,
    save_graph,
)


def save(path, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def step_onnx(tmp_path_factory):
    return save_graph(tmp_path_factory.mktemp("onnx") / "step.onnx", STEP)


@pytest.fixture(scope="module")
def past_onnx(tmp_path_factory):
    return save_graph(tmp_path_factory.mktemp("onnx") / "past.onnx", PAST)


@pytest.fixture
def backend():
    return OnnxRuntimeBackend(threads=1)


def test_two_bindings_of_one_network_read_each_others_output(backend, step_onnx):
    check_two_bindings(backend, backend.load(STEP, step_onnx))


def test_a_run_writes_into_the_bound_memory(backend, step_onnx):
    network = backend.load(STEP, step_onnx)
    buffers = allocate(backend, STEP, batch=1)
    address = buffers["next_x"].array.ctypes.data
    bound = network.bind(buffers)
    for value in (1, 2):
        backend.upload(buffers["x"], np.full((1, 3), value, np.float32))
        bound.enqueue()
        assert (buffers["next_x"].array == value).all()
    assert buffers["next_x"].array.ctypes.data == address


def test_a_binding_keeps_its_buffers_alive(backend, step_onnx):
    network = backend.load(STEP, step_onnx)
    kept = buffer_of(backend, (2, 3), "float32")
    bound = network.bind({**allocate(backend, STEP, batch=2), "next_x": kept})
    del network
    gc.collect()
    filler = [np.full((2, 3), np.nan, np.float32) for _ in range(100)]
    bound.enqueue()
    np.testing.assert_array_equal(backend.download(kept), np.zeros((2, 3)))
    assert len(filler) == 100


def test_a_dimension_may_be_zero(backend, past_onnx):
    network = backend.load(PAST, past_onnx)
    for past in (0, 3):
        buffers = allocate(backend, PAST, past=past, s=2)
        backend.upload(buffers["past"], np.ones((2, past), np.float32))
        backend.upload(buffers["new"], np.ones((2, 2), np.float32))
        network.bind(buffers).enqueue()
        assert backend.download(buffers["total"]) == 2 * (past + 2)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_row_is_filled_up_with_zeros(backend, count):
    check_row_filling(backend, count)


def test_downloads_are_copies(backend):
    buffer = buffer_of(backend, (3,), "float32")
    before = backend.download(buffer)
    backend.upload(buffer, np.ones(3, np.float32))
    assert not before.any()
    assert (backend.download(buffer) == 1).all()


def test_uploads_convert_between_floats_and_refuse_everything_else(backend):
    buffer = buffer_of(backend, (2, 3), "float32")
    backend.upload(buffer, np.full((2, 3), 0.5, np.float64))
    assert (backend.download(buffer) == 0.5).all()
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit a buffer of shape \(2, 3\)"):
        backend.upload(buffer, np.zeros(3, np.float32))
    ids = buffer_of(backend, (1,), "int32")
    with pytest.raises(TypeError):
        backend.upload(ids, np.ones(1, np.float32))


def test_buffers_of_another_backend_are_refused(backend, step_onnx):
    with pytest.raises(TypeError, match="a ndarray is not a buffer of the onnxruntime backend"):
        backend.load(STEP, step_onnx).bind({"x": np.zeros((1, 3))})


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 30])
def test_a_file_that_is_no_graph_is_one_line(backend, tmp_path, capfd, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime .* cannot load it: ") as caught:
        backend.load(STEP, path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the library prints nothing"


def test_missing_external_weights_are_one_line(backend, tmp_path):
    weights = numpy_helper.from_array(np.ones(1000, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "xy"]
    path = save(tmp_path / "m.onnx", [node], info[:1], info[1:], [weights])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    spec = NetworkSpec("n", (TensorSpec("x", "float32", (1000,)),), (TensorSpec("y", "float32", (1000,)),))
    with pytest.raises(BundleError, match="cannot load it") as caught:
        backend.load(spec, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("linked", [False, True])
def test_weights_may_be_links_into_another_folder(backend, tmp_path, linked):
    """As in a cache of Hugging Face's hub, where every file is a link to one that is named by its hash."""
    weights = numpy_helper.from_array(np.arange(1000, dtype=np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "xy"]
    root = tmp_path / "snapshots" / "main"
    for folder in (root / "weights" / "unet", root / "networks", tmp_path / "blobs"):
        folder.mkdir(parents=True)
    path = save(root / "weights" / "m.onnx", [node], info[:1], info[1:], [weights])
    location = "unet/weights.bin"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=0)
    path = path.rename(root / "networks" / "m.onnx")
    file = root / "weights" / location
    if linked:
        for place in (path, file):
            place.symlink_to(place.rename(tmp_path / "blobs" / place.name))
    spec = NetworkSpec("n", (TensorSpec("x", "float32", (1000,)),), (TensorSpec("y", "float32", (1000,)),))
    network = backend.load(spec, path, (file,))
    buffers = backend.allocate({name: ((1000,), "float32") for name in "xy"})
    network.bind(buffers).enqueue()
    np.testing.assert_array_equal(buffers["y"].array, np.arange(1000))


def test_an_unknown_operator_is_one_line(backend, tmp_path):
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    path = save(tmp_path / "m.onnx", [helper.make_node("Levitate", ["x"], ["y"])], info[:1], info[1:])
    spec = NetworkSpec("n", (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
    with pytest.raises(BundleError, match="Levitate"):
        backend.load(spec, path)


def test_a_graph_with_other_tensors_than_the_manifest_is_refused(backend, step_onnx):
    spec = NetworkSpec("step", (STEP.inputs[0], STEP.inputs[2]), STEP.outputs)
    with pytest.raises(BundleError, match=r"its inputs differ from the manifest's: missing \[\], unexpected \['ids'\]"):
        backend.load(spec, step_onnx)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, True])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(InputError, match="it must be an integer from 1 to 1024"):
        backends.create("onnxruntime", threads)


def test_an_unknown_backend_lists_those_there_are():
    with pytest.raises(InputError, match="no backend 'abacus'; there are: auto, onnxruntime, "):
        backends.create("abacus")
    assert backends.create("onnxruntime").name == "onnxruntime"


def test_out_of_memory_while_running_is_one_line(backend, tmp_path):
    """A network that allocates as many zeros as its input says, and sums them up."""
    spec = NetworkSpec("zeros", (TensorSpec("count", "int64", (1,)),), (TensorSpec("total", "float32", ()),))
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["total"], keepdims=0),
    ]
    tensors = (("count", TensorProto.INT64, [1]), ("total", TensorProto.FLOAT, []))
    given, made = (helper.make_tensor_value_info(*tensor) for tensor in tensors)
    network = backend.load(spec, save(tmp_path / "zeros.onnx", nodes, [given], [made]))
    buffers = backend.allocate({"count": ((1,), "int64"), "total": ((), "float32")})
    bound = network.bind(buffers)
    backend.upload(buffers["count"], np.array([1 << 50]))
    with pytest.raises(OutOfMemory, match=r"^zeros: ONNX Runtime .* cannot run it: .*; close other programs") as caught:
        bound.enqueue()
    assert "\n" not in str(caught.value)
    backend.upload(buffers["count"], np.array([3]))
    bound.enqueue()
    assert backend.download(buffers["total"]) == 0


def test_another_failure_while_running_is_one_line(backend, tmp_path):
    spec = NetworkSpec("pick", (TensorSpec("index", "int64", (1,)),), (TensorSpec("value", "float32", (1,)),))
    table = numpy_helper.from_array(np.ones(4, np.float32), "table")
    nodes = [helper.make_node("Gather", ["table", "index"], ["value"])]
    given = helper.make_tensor_value_info("index", TensorProto.INT64, [1])
    made = helper.make_tensor_value_info("value", TensorProto.FLOAT, [1])
    network = backend.load(spec, save(tmp_path / "pick.onnx", nodes, [given], [made], [table]))
    buffers = backend.allocate({"index": ((1,), "int64"), "value": ((1,), "float32")})
    backend.upload(buffers["index"], np.array([9]))
    with pytest.raises(MomaError, match=r"^pick: ONNX Runtime .* cannot run it: .*indices element out of") as caught:
        network.bind(buffers).enqueue()
    assert "\n" not in str(caught.value)


FORK = """
import os, signal, sys
from pathlib import Path
import numpy as np
from moma_rt.backends import create
from tests.moma_rt.backends.networks import STEP, check_two_bindings, save_graph

path = save_graph(Path(sys.argv[1]) / "step.onnx", STEP)
backend = create("onnxruntime", 4)
network = backend.load(STEP, path)
child = os.fork()
if child == 0:
    signal.alarm(60)
    # Deleting the inherited session would wait for its threads, which are not here; so would the end of the process.
    del network
    check_two_bindings(backend, backend.load(STEP, path))
    sys.exit(7)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_runs_networks_of_its_own_and_ends(tmp_path, repository):
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
