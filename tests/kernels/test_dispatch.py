"""The torch operators under PyTorch's compilers: the Triton kernel on a GPU, the definition elsewhere."""

from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

import kernels.context_cross_attention.operator
import kernels.injected_self_attention.operator  # noqa: F401  (both register the torch operators)
from kernels.context_cross_attention.triton_kernel import context_cross_attention_kernel
from kernels.dispatch import uses_triton_kernel
from kernels.injected_self_attention.triton_kernel import injected_self_attention_kernel

HEADS = 2
KERNELS = MappingProxyType(
    {
        "injected_self_attention": injected_self_attention_kernel,
        "context_cross_attention": context_cross_attention_kernel,
    }
)


class Both(torch.nn.Module):
    """Both operators after each other, between operations that a compiler may fuse."""

    def forward(self, q, ref, mask, gate, scale, text, weights):
        own = torch.ops.moma.injected_self_attention(q, q + 1, q, ref, ref * 2, mask, gate, scale, HEADS)
        out, saliency = torch.ops.moma.context_cross_attention(own, text, text, text, text, gate, weights, HEADS)
        return out.relu(), saliency * 2


def make_inputs(samples, groups, queries, references, device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(queries)

    def made(*sizes):
        return torch.rand(sizes, generator=random).to(device, dtype)

    return (
        made(groups * samples, queries, 16 * HEADS),
        made(samples, references, 16 * HEADS),
        torch.ones(samples, references, device=device, dtype=dtype),
        made(samples, queries),
        made(1),
        made(groups * samples, 7, 16 * HEADS),
        made(samples, 7),
    )


def exported(device="cpu", dtype=torch.float32):
    rows, samples, references = (torch.export.Dim(name, max=64) for name in ("rows", "samples", "references"))
    per_sample = {0: samples}
    shapes = (
        {0: rows},
        {0: samples, 1: references},
        {0: samples, 1: references},
        per_sample,
        {},
        {0: rows},
        per_sample,
    )
    return torch.export.export(Both(), make_inputs(2, 2, 9, 6, device, dtype), dynamic_shapes=shapes)


def assert_same(found, inputs, tolerance=1e-5):
    for output, wanted in zip(found, Both()(*inputs), strict=True):
        torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(2, 2, 9, 6), (1, 1, 9, 4)])
def test_compiled_on_a_cpu(sizes):
    inputs = make_inputs(*sizes)
    assert_same(torch.compile(Both(), fullgraph=True)(*inputs), inputs)


def test_ahead_of_time_on_a_cpu(tmp_path):
    path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "both.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for sizes in ((2, 2, 9, 6), (3, 1, 9, 5), (1, 2, 9, 11)):
        inputs = make_inputs(*sizes)
        assert_same(loaded(*inputs), inputs)


@pytest.fixture
def h100(monkeypatch):
    """Make compilers that ask about the device before they run anything on it see an H100."""
    for module in ("kernels.dispatch", "kernels.injected_self_attention.triton_kernel"):
        monkeypatch.setattr(f"{module}.compute_capability", lambda _: 90)
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def test_compilers_see_the_kernel_on_a_gpu(h100):
    shapes = [tensor.shape for tensor in make_inputs(2, 2, 64, 48)]
    with FakeTensorMode():
        inputs = tuple(torch.empty(shape, device="cuda", dtype=torch.float16) for shape in shapes)
        module, _ = aot_export_module(Both(), inputs, trace_joint=False)
    table = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
    launched = [node for node in module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    # With the launch's warps and stages, as an autotuner that has one choice.
    tuned = [table.get_kernel(node.kwargs["kernel_idx"]) for node in launched]
    assert [kernel.fn for kernel in tuned] == list(KERNELS.values())
    assert [[config.num_warps for config in kernel.configs] for kernel in tuned] == [[4], [2]]
    # Query blocks of 32, samples and heads or samples, guidance halves.
    assert launched[0].kwargs["grid"] == [(2, 2 * HEADS, 2)]
    assert launched[1].kwargs["grid"] == [(2, 2, 2)]
    # The tensors that it writes to, found from its code.
    assert [node.kwargs["tensors_to_clone"] for node in launched] == [["p_out"], ["p_out", "p_saliency"]]
    assert not any(getattr(node.target, "namespace", "") == "moma" for node in module.graph.nodes)


def test_kernels_are_part_of_the_compile_cache_key():
    for name, kernel in KERNELS.items():
        assert kernel in torch._library.triton.get_triton_kernels_for_op(f"moma::{name}")


def test_what_has_no_kernel_takes_the_definition(monkeypatch):
    monkeypatch.setattr("kernels.dispatch.compute_capability", lambda _: 80)
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, device="cuda", dtype=torch.float64)
        assert not uses_triton_kernel(q)
        assert uses_triton_kernel(q.half())
        # Without the instructions that the kernels are made of, they would be far slower than the definition.
        monkeypatch.setattr("kernels.dispatch.compute_capability", lambda _: 75)
        assert not uses_triton_kernel(q.half())
    assert not uses_triton_kernel(torch.empty(2, 4, 32))


SIZES = ("gsc gsc gsc bnc bnc bn bs i", "gsc gtc gtc gmc gmc bs bt")
KNOWN = MappingProxyType({"g": 4, "b": 2, "s": 5, "n": 6, "t": 7, "m": 3, "c": 8, "i": 1})


@pytest.mark.parametrize("operator", KERNELS)
def test_inconsistent_sizes_are_refused(operator):
    call = getattr(torch.ops.moma, operator)
    layouts = SIZES[list(KERNELS).index(operator)].split()
    right = [torch.rand([KNOWN[letter] for letter in layout]) for layout in layouts]
    call(*right, 2)
    for index, layout in enumerate(layouts):
        for axis, letter in enumerate(layout):
            if sum(letter in other for other in layouts) > 1 and letter != "i":
                wrong = list(right)
                wrong[index] = torch.rand([KNOWN[x] + (i == axis) for i, x in enumerate(layout)])
                with pytest.raises(ValueError, match=f"{letter.upper()} is |multiple"):
                    call(*wrong, 2)
        wrong = [*right[:index], right[index][None], *right[index + 1 :]]
        with pytest.raises(ValueError, match="was given for layout"):
            call(*wrong, 2)
    for heads in (0, 3, -2):
        with pytest.raises(ValueError, match=f"8 channels are no multiple of {heads} heads"):
            call(*right, heads)


@pytest.mark.parametrize("letter", ["b", "n", "s", "t", "m"])
def test_nothing_may_be_empty(letter):
    known = {**KNOWN, letter: 0}
    for operator, layouts in zip(KERNELS, SIZES, strict=True):
        if letter in layouts.replace(" ", ""):
            tensors = [torch.rand([known[x] for x in layout]) for layout in layouts.split()]
            with pytest.raises(ValueError, match=f"{letter.upper()} may not be 0"):
                getattr(torch.ops.moma, operator)(*tensors, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_on_a_gpu(dtype):
    for sizes in ((2, 2, 64, 48), (1, 1, 63, 111)):
        inputs = make_inputs(*sizes, "cuda", dtype)
        assert_same(torch.compile(Both(), fullgraph=True)(*inputs), inputs, 2e-2)


@pytest.mark.gpu
def test_ahead_of_time_on_a_gpu(tmp_path):
    program = exported("cuda", torch.float16)
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "both.pt2"))
    )
    for sizes in ((2, 2, 9, 6), (3, 1, 9, 5), (1, 2, 9, 11)):
        inputs = make_inputs(*sizes, "cuda", torch.float16)
        assert_same(loaded(*inputs), inputs, 2e-2)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    inputs = make_inputs(1, 2, 64, 48, "cuda", torch.float16)
    module = Both()
    module(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(*inputs)
    inputs[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, inputs, 0)
