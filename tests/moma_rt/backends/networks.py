"""Two small networks: their specs, NumPy functions and ONNX graphs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from moma_rt.backends.base import Backend, Buffer, Network
from moma_rt.bundle.specs import Dim, NetworkSpec, TensorSpec

BATCH = Dim("batch", 1, 2, 1 << 20)
STEP = NetworkSpec(
    "step",
    (TensorSpec("x", "float32", (BATCH, 3)), TensorSpec("ids", "int32", (BATCH, 3)), TensorSpec("y", "float32", (1,))),
    (TensorSpec("next_x", "float32", (BATCH, 3)), TensorSpec("image", "uint8", (BATCH, 3))),
)
PAST = NetworkSpec(
    "past",
    (TensorSpec("past", "float32", (2, Dim("past", 0, 1, 9))), TensorSpec("new", "float32", (2, Dim("s", 1, 1, 9)))),
    (TensorSpec("kv", "float32", (2, Dim("s", 1, 1, 9))), TensorSpec("total", "float32", (1, 1))),
)


def step(i: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"next_x": i["x"] + i["ids"] + i["y"], "image": i["ids"].astype(np.uint8)}


def past(i: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"kv": 2 * i["new"], "total": (i["past"].sum() + i["new"].sum()).reshape(1, 1)}


NODES: dict[str, list[NodeProto]] = {
    "step": [
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "floats"], ["sum"]),
        helper.make_node("Add", ["sum", "y"], ["next_x"]),
        helper.make_node("Cast", ["ids"], ["image"], to=TensorProto.UINT8),
    ],
    "past": [
        helper.make_node("Add", ["new", "new"], ["kv"]),
        helper.make_node("Concat", ["past", "new"], ["all"], axis=1),
        helper.make_node("ReduceSum", ["all"], ["total"], keepdims=1),
    ],
}


def save_graph(path: Path, spec: NetworkSpec) -> Path:
    """Write the ONNX graph of `STEP` or `PAST`."""

    def described(tensor: TensorSpec) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        return helper.make_tensor_value_info(tensor.name, kind, [getattr(d, "name", d) for d in tensor.shape])

    inputs, outputs = map(described, spec.inputs), map(described, spec.outputs)
    graph = helper.make_graph(NODES[spec.name], spec.name, list(inputs), list(outputs))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def allocate(backend: Backend, spec: NetworkSpec, **sizes: int) -> dict[str, Buffer]:
    """Buffers of all inputs and outputs."""
    return backend.allocate({t.name: (t.resolve(**sizes), t.dtype) for t in (*spec.inputs, *spec.outputs)})


def buffer_of(backend: Backend, shape: tuple[int, ...], dtype: str) -> Buffer:
    return backend.allocate({"": (shape, dtype)})[""]


def check_two_bindings(backend: Backend, step: Network) -> None:
    """Each of two bindings of `STEP` reads what the other one wrote; they share all other buffers."""
    even = allocate(backend, STEP, batch=2)
    odd = {**even, "x": even["next_x"], "next_x": even["x"]}
    steps = [step.bind(even), step.bind(odd)]
    backend.upload(even["ids"], np.arange(6, dtype=np.int32).reshape(2, 3))
    for i in range(4):
        steps[i % 2].enqueue()
    np.testing.assert_array_equal(backend.download(even["x"]), 4 * np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(backend.download(even["next_x"]), 3 * np.arange(6).reshape(2, 3))
    image = backend.download(even["image"])
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.arange(6).reshape(2, 3))


def check_row_filling(backend: Backend, count: int) -> None:
    """A row of 4 vectors is filled with `count` vectors and zeros; other rows stay as they were."""
    target, source = buffer_of(backend, (3, 4, 5), "float16"), buffer_of(backend, (count, 5), "float16")
    backend.upload(target, np.ones((3, 4, 5), np.float16))
    backend.upload(source, np.full((count, 5), 7, np.float16))
    backend.fill_row(target, 1, source)
    expected = np.ones((3, 4, 5))
    expected[1] = 0
    expected[1, :count] = 7
    np.testing.assert_array_equal(backend.download(target), expected)
