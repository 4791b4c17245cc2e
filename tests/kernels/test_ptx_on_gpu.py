"""Kernels compiled ahead of time, launched as TensorRT does: PTX alone, through the CUDA driver, without Triton.

Each kernel that `kernels.compile` writes is loaded and launched with what its docstring says: the operator's tensors in
their order, the number of reference tokens where there is one, the outputs.
"""

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch

from kernels.compile import main
from kernels.context_cross_attention.reference import context_cross_attention
from kernels.injected_self_attention.reference import injected_self_attention
from kernels.launch import CAPABILITIES
from kernels.ptx import DTYPES, INDEX_NAME, SD15_LAYERS, SELF

pytestmark = pytest.mark.gpu

SAMPLES, GROUPS = 2, 2
REFERENCE_TOKENS = 111


@pytest.fixture(scope="module")
def capability():
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in CAPABILITIES:
        pytest.skip(f"there is no PTX for compute capability {major}.{minor}")
    return 10 * major + minor


@pytest.fixture(scope="module")
def written(capability, tmp_path_factory):
    """(layer, dtype) → what `kernels.json` says of its kernel, and the PTX."""
    folder = tmp_path_factory.mktemp("ptx") / "kernels"
    assert main(["--capabilities", str(capability), "--out", str(folder)]) == 0
    index = json.loads((folder / INDEX_NAME).read_text())
    kernels = {(k["operator"], k["width"], k["queries"], k["dtype"]): k for k in index["kernels"]}

    def of(layer, dtype):
        kernel = kernels[layer.operator, layer.width, layer.queries, dtype]
        return SimpleNamespace(**kernel), (folder / kernel["file"]).read_bytes()

    return of


def called(function, *arguments):
    error, *values = function(*arguments)
    assert int(error) == 0, f"{function.__name__}: {error!r}"
    return values[0] if values else None


def launch(kernel, ptx, grid, arguments):
    """Load the PTX and launch it once; tensors are passed as pointers, numbers as 32 bits."""
    driver = pytest.importorskip("cuda.bindings.driver")
    # PyTorch's context, which is the device's primary one, is current once PyTorch has done anything on it.
    torch.cuda.synchronize()
    module = called(driver.cuModuleLoadData, ptx + b"\0")
    try:
        function = called(driver.cuModuleGetFunction, module, kernel.entry.encode())
        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
        types = tuple(ctypes.c_void_p if isinstance(a, torch.Tensor) else ctypes.c_int for a in arguments)
        block = (kernel.threads, 1, 1)
        called(driver.cuLaunchKernel, function, *grid, *block, kernel.shared_bytes, 0, (values, types), 0)
        torch.cuda.synchronize()
    finally:
        called(driver.cuModuleUnload, module)


def make_inputs(layer, dtype):
    generator = torch.Generator("cuda").manual_seed(layer.queries)
    rows, channels = GROUPS * SAMPLES, layer.heads * layer.width

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda").to(dtype)

    q = normal(rows, layer.queries, channels)
    gate = normal(SAMPLES, layer.queries).sigmoid()
    gate[:, : layer.queries // 2] = 0.0
    if layer.operator == SELF:
        mask = (normal(SAMPLES, REFERENCE_TOKENS) > 0).to(dtype)
        reference = [normal(SAMPLES, REFERENCE_TOKENS, channels) for _ in range(2)]
        return (q, normal(*q.shape), normal(*q.shape), *reference, mask, gate, normal(1))
    text = [normal(rows, layer.tokens[0], channels) for _ in range(2)]
    context = [normal(rows, layer.tokens[1], channels) for _ in range(2)]
    return (q, *text, *context, gate, normal(SAMPLES, layer.tokens[0]).abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", SD15_LAYERS, ids=lambda x: f"{x.operator}-{x.width}x{x.queries}")
def test_launched_by_the_driver(layer, dtype, written):
    kernel, ptx = written(layer, dtype)
    inputs = make_inputs(layer, getattr(torch, dtype))
    q = inputs[0]
    blocks = -(-layer.queries // kernel.block_queries)
    if layer.operator == SELF:
        outputs = [torch.full_like(q, torch.nan)]
        launch(kernel, ptx, (blocks, SAMPLES * layer.heads, GROUPS), (*inputs, REFERENCE_TOKENS, *outputs))
        in_torch = [injected_self_attention(*inputs, layer.heads)]
        wanted = [injected_self_attention(*(t.float() for t in inputs), layer.heads)]
    else:
        outputs = [torch.full_like(q, torch.nan), torch.full_like(q[..., 0], torch.nan)]
        launch(kernel, ptx, (blocks, SAMPLES, GROUPS), (*inputs, *outputs))
        in_torch = context_cross_attention(*inputs, layer.heads)
        wanted = context_cross_attention(*(t.float() for t in inputs), layer.heads)
    for output, same_precision, exact in zip(outputs, in_torch, wanted, strict=True):
        error, plain = ((t.float() - exact).abs().max().item() for t in (output, same_precision))
        # NaN, which the outputs hold before the launch, fails this comparison.
        assert error <= max(2 * plain, torch.finfo(q.dtype).eps * exact.abs().max().item())
