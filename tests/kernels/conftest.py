"""Naive float64 attention, the same operators as ONNX models, and the grid of shapes every operator is tested on."""

import contextlib
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kernels.dispatch import HAS_TRITON
from kernels.launch import LaunchConfig

if TYPE_CHECKING:
    import onnx

    from kernels.registration import OnnxOperator

# PyTorch has no Triton on some systems, and the operators work there without it.
collect_ignore = [] if HAS_TRITON else ["test_compile.py", "test_ptx.py", "test_dispatch.py", "test_ptx_on_gpu.py"]
# Kernels are tested on GPU machines that export nothing.
if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
    collect_ignore += [
        "test_registration.py",
        "injected_self_attention/test_injected_self_attention.py",
        "context_cross_attention/test_context_cross_attention.py",
    ]


@dataclass(frozen=True)
class Shape:
    """Sizes of one test: guidance halves, samples, queries, text or reference tokens, heads and their width."""

    groups: int
    batch: int
    queries: int
    tokens: int
    heads: int
    width: int

    @property
    def channels(self) -> int:
        return self.heads * self.width


SHAPES = (
    Shape(1, 1, 1, 1, 1, 2),
    Shape(2, 1, 63, 111, 8, 2),
    Shape(2, 3, 63, 7, 8, 4),
    Shape(1, 2, 111, 77, 8, 40),
    Shape(2, 1, 64, 63, 8, 80),
    Shape(2, 2, 17, 33, 5, 160),
)


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s.groups}x{s.batch}-{s.queries}q-{s.tokens}t-{s.heads}x{s.width}")
def shape(request) -> Shape:
    return request.param


@pytest.fixture
def random() -> Callable[..., torch.Tensor]:
    """Standard normal float32 tensors from one generator."""
    generator = torch.Generator().manual_seed(7)
    return lambda *sizes: torch.randn(sizes, generator=generator)


@pytest.fixture
def naive() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """(q [S,C], k [N,C], v [N,C], heads, keep [N]) in float64 → output [S,C] and probabilities [heads,S,N]."""

    def attend(q, k, v, heads, keep=None):
        q, k, v = (np.asarray(t.double()).reshape(len(t), heads, -1).transpose(1, 0, 2) for t in (q, k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        if keep is not None:
            scores[:, :, ~keep] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ v).transpose(1, 0, 2).reshape(q.shape[1], -1), weights

    return attend


# Sizes of the axes that the torch operators' argument names spell, all different; every axis but the channels is
# dynamic in the exported model, as it is in the denoiser.
EXAMPLE_SIZES = MappingProxyType({"g": 4, "b": 2, "s": 6, "n": 10, "t": 7, "m": 5, "c": 32})
EXAMPLE_HEADS = 8


def _export(operator: "OnnxOperator") -> "onnx.ModelProto":
    from kernels.registration import STANDARD_OPSET

    class Call(torch.nn.Module):
        def forward(self, *inputs):
            return operator.torch_op(*inputs, EXAMPLE_HEADS)

    names = [argument.name for argument in operator.torch_op._schema.arguments[:-1]]
    # scale, [1], is the one tensor without a layout.
    layouts = [name.rpartition("_")[2] if "_" in name else "" for name in names]
    dims = {letter: torch.export.Dim(letter, max=4096) for letter in EXAMPLE_SIZES if letter != "c"}
    with warnings.catch_warnings():
        # The exporter warns of axes that share a size, which is what one letter for two axes asks for.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Call().eval(),
            tuple(torch.rand([EXAMPLE_SIZES[letter] for letter in layout] or [1]) for layout in layouts),
            dynamo=True,
            opset_version=STANDARD_OPSET,
            input_names=[i.name for i in operator.schema.inputs],
            output_names=[o.name for o in operator.schema.outputs],
            dynamic_shapes=(tuple({axis: dims[x] for axis, x in enumerate(t) if x in dims} for t in layouts),),
            custom_translation_table={operator.torch_op: operator.translation},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.functions.append(operator.function)
    return model


def _resize(model: "onnx.ModelProto", heads: int, channels: int, dtype: torch.dtype) -> None:
    import onnx

    kind = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}[dtype]
    values = {"num_heads": heads, "softmax_scale": (channels // heads) ** -0.5}
    node = model.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(name, value) for name, value in values.items())])
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = kind
        if len(value.type.tensor_type.shape.dim) == 3:
            value.type.tensor_type.shape.dim[2].dim_value = channels


@pytest.fixture(scope="session")
def exported() -> "Callable[..., onnx.ModelProto]":
    """A torch operator's one-node model with its function and dynamic axes, from the exporter; made once."""
    import onnx

    from kernels.operators import onnx_operators
    from kernels.registration import register_schema

    operators = {operator.torch_op: operator for operator in onnx_operators()}
    for operator in operators.values():
        register_schema(operator.schema)
    models: dict[torch._ops.OpOverload, onnx.ModelProto] = {}

    def model_of(operator) -> onnx.ModelProto:
        overload = operator._opoverload
        if overload not in models:
            models[overload] = _export(operators[overload])
        model = onnx.ModelProto()
        model.CopyFrom(models[overload])
        return model

    return model_of


@pytest.fixture(scope="session")
def sized(exported) -> "Callable[..., onnx.ModelProto]":
    """`exported` with a call's heads, channels and precision: constants of a network, on which nothing else depends."""

    def model_of(operator, tensors: tuple[torch.Tensor, ...], heads: int) -> "onnx.ModelProto":
        model = exported(operator)
        _resize(model, heads, tensors[0].shape[-1], tensors[0].dtype)
        return model

    return model_of


@pytest.fixture(scope="session")
def run_onnx(sized, tmp_path_factory) -> Callable[..., tuple[list[np.ndarray], Path]]:
    """Run one operator call in ONNX Runtime, from the model that serves all shapes; returns outputs and the file."""
    import onnx
    import onnxruntime

    def run(operator, tensors: tuple[torch.Tensor, ...], heads: int):
        model = sized(operator, tensors, heads)
        path = tmp_path_factory.mktemp("operator") / "model.onnx"
        onnx.save(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, options)
        feed = {i.name: t.contiguous().numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        return session.run(None, feed), path

    return run


# The interpreter itself fails so, converting an array of one element to a number; compiled kernels never do.
_INTERPRETER_NUMPY_ERROR = "only 0-dimensional arrays can be converted to Python scalars"


@pytest.fixture(scope="session")
def interpreter(repository) -> Iterator[Callable[..., Any]]:
    """(operator, tensors, heads, launch or None) → what the kernel computes in Triton's interpreter."""
    pytest.importorskip("triton")
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreter.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )

    def run(operator: str, tensors: tuple[torch.Tensor, ...], heads: int, config: LaunchConfig | None = None) -> Any:
        pickle.dump((operator, tensors, heads, config), worker.stdin)
        worker.stdin.flush()
        answer = pickle.load(worker.stdout)
        if isinstance(answer, Exception):
            version = importlib.metadata.version("triton")
            if version.startswith("3.6.") and _INTERPRETER_NUMPY_ERROR in str(answer):
                pytest.skip(
                    f"Triton {version}'s interpreter fails with NumPy {np.__version__}: {_INTERPRETER_NUMPY_ERROR}"
                )
            raise answer
        return answer

    with worker:
        yield run
        worker.stdin.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run_kernel(request) -> Callable[..., Any]:
    """(operator, tensors, heads) → the kernel's outputs on the CPU: interpreted, and on a GPU where there is one."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")

    def run(operator: str, tensors: tuple[torch.Tensor, ...], heads: int) -> Any:
        with _poisoned_memory():
            found = getattr(torch.ops.moma, operator)(*(t.cuda() for t in tensors), heads)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(t.cpu() for t in found)

    return run


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill memory that torch allocates with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
