"""Naive float64 attention, the same operators as ONNX models, and the grid of shapes every operator is tested on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from kernels.operators import onnx_operators
from kernels.registration import DOMAIN, DOMAIN_VERSION, STANDARD_OPSET, register_schema


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


@pytest.fixture(scope="session")
def run_onnx(tmp_path_factory) -> Callable[..., tuple[list[np.ndarray], Path]]:
    """Export one operator call as `export` does, run it in ONNX Runtime; returns the outputs and the file."""
    import onnx_ir

    operators = onnx_operators()
    for operator in operators:
        register_schema(operator.schema)

    def run(operator, tensors: tuple[torch.Tensor, ...], heads: int, attributes: dict | None = None):
        class Call(torch.nn.Module):
            def forward(self, *inputs):
                return operator(*inputs, heads)

        program = torch.onnx.export(
            Call().eval(),
            tensors,
            dynamo=True,
            opset_version=STANDARD_OPSET,
            custom_translation_table={o.torch_op: o.translation for o in operators},
            verbose=False,
        )
        for known in operators:
            function = onnx_ir.serde.deserialize_function(known.function)
            program.model.functions[function.identifier()] = function
        program.model.opset_imports[DOMAIN] = DOMAIN_VERSION
        for name, value in (attributes or {}).items():
            next(n for n in program.model.graph if n.domain == DOMAIN).attributes[name] = onnx_ir.AttrString(
                name, value
            )
        path = tmp_path_factory.mktemp("operator") / "model.onnx"
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, options)
        feed = {i.name: t.contiguous().numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        return session.run(None, feed), path

    return run
