"""Launch the kernels three times, with all edge cases, on tensors small enough for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.kernels.sanitized_launches

Without PyTorch's caching allocator each tensor is its own allocation, so out-of-bounds accesses are detected. Exits
with 1 if a result differs from the reference on the CPU.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels.context_cross_attention.operator
import kernels.injected_self_attention.operator  # noqa: F401  (both register the torch operators)
from benchmarks.timer import gpu_name

# For half precision, relative to the largest output.
TOLERANCE = 5e-3

Launch = tuple[str, tuple[Tensor, ...], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch on the device and compare; returns the exit code, 2 without a GPU."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.sanitized_launches", description=__doc__.splitlines()[0]
    )
    p.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where to run; cpu compares the reference with itself (default: %(default)s)",
    )
    device = p.parse_args(arguments).device
    if device == "cuda" and gpu_name() is None:
        print(
            "benchmarks.kernels.sanitized_launches: error: needs a CUDA GPU, and PyTorch and Triton for it",
            file=sys.stderr,
        )
        return 2
    status = 0
    for operator, tensors, heads in launches():
        # A CPU runs the reference, which in half precision cannot represent a mask without a token.
        launch = (operator, tuple(t.float() if device == "cpu" else t for t in tensors), heads)
        worst = difference(launch, device)
        is_right = worst <= TOLERANCE
        status = status if is_right else 1
        print(f"{launch[0]} {tuple(launch[1][0].shape)}: off by {worst:.2g}{'' if is_right else ', which is wrong'}")
    return status


def launches() -> list[Launch]:
    """Return the launches: operator, its tensors, number of heads."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).half()

    def self_attention(queries: int, width: int, mask: Tensor) -> Launch:
        channels, (samples, tokens) = 2 * width, mask.shape
        own = [normal(2 * samples, queries, channels) for _ in range(3)]
        reference = [normal(samples, tokens, channels) for _ in range(2)]
        gate = normal(samples, queries).sigmoid()
        # The zeros end inside a block of queries.
        gate[:, : queries // 3] = 0.0
        return "injected_self_attention", (*own, *reference, mask, gate, torch.ones(1).half()), 2

    # One sample has no unmasked token, one is padded to the length of the third.
    masks = torch.ones(3, 70).half()
    masks[0] = 0.0
    masks[1, 33:] = 0.0
    text = [normal(4, 111, 80) for _ in range(2)]
    context = [normal(4, 5, 80) for _ in range(2)]
    weights = normal(2, 111).abs()
    return [
        # Too many queries for small blocks; neither queries nor tokens fill their last block.
        self_attention(300, 40, (normal(1, 77) > 0).half()),
        self_attention(17, 160, masks),
        ("context_cross_attention", (normal(4, 63, 80), *text, *context, normal(2, 63).sigmoid(), weights), 2),
    ]


def difference(launch: Launch, device: str) -> float:
    """Return the largest error of the operator on `device`, relative to the largest reference value; NaN stays NaN."""
    operator, tensors, heads = launch
    call = getattr(torch.ops.moma, operator)
    found = _listed(call(*(t.to(device) for t in tensors), heads))
    # In fp32, where a mask without a token gives the average of all tokens, as it should.
    wanted = _listed(call(*(t.float() for t in tensors), heads))
    distances = [(f.cpu().float() - w).abs().max() / w.abs().max() for f, w in zip(found, wanted, strict=True)]
    return float(torch.stack(distances).max())


def _listed(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


if __name__ == "__main__":
    sys.exit(main())
