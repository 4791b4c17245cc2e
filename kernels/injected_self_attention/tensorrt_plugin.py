"""`moma::InjectedSelfAttention` as a TensorRT plugin: its shapes, its types, and how its kernel is launched.

A quick deployable plugin with an ahead-of-time implementation, which TensorRT has since 10.9: the builder copies the
kernel's PTX into the engine, and where that runs neither Python nor this file is needed.
"""

import math
from collections.abc import Callable
from typing import Any

NAME = "InjectedSelfAttention"
_ID = f"moma::{NAME}"
_TENSORS = 9


def register(find: Callable[..., Any]) -> None:
    """Make the plugin known to TensorRT in this process, which must not know it yet.

    TensorRT calls these functions as it parses and compiles a graph. It reads their signatures: every annotation must
    be a type and not text, and every attribute must be there, in this order, since all are given by position.

    Args:
        find: called with the operator, TensorRT's name of the dtype (HALF, BF16), the number of heads, their width,
            the number of queries and (); returns the kernel, of which `entry`, `ptx`, `block_queries`, `threads` and
            `shared_bytes` are read. What it raises becomes TensorRT's error.

    Raises:
        ImportError: this TensorRT has no `tensorrt.plugin`.
    """
    import tensorrt.plugin as trtp

    @trtp.register(_ID)
    def describe(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        ref_k: trtp.TensorDesc,
        ref_v: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        num_heads: int,
        softmax_scale: float,
    ) -> trtp.TensorDesc:
        return q.like()

    @trtp.autotune(_ID)
    def types(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        ref_k: trtp.TensorDesc,
        ref_v: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        num_heads: int,
        softmax_scale: float,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(", ".join([q.dtype.name] * _TENSORS), "LINEAR")]

    @trtp.aot_impl(_ID)
    def launch(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        ref_k: trtp.TensorDesc,
        ref_v: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        num_heads: int,
        softmax_scale: float,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
        _, queries, channels = q.shape
        if not math.isclose(softmax_scale, (channels // num_heads) ** -0.5, rel_tol=1e-5):
            raise ValueError(f"the kernel of {NAME} scales by 1/sqrt(head width), and not by {softmax_scale}")
        kernel = find(NAME, q.dtype.name, num_heads, channels // num_heads, queries, ())
        rows, (samples, reference_tokens, _) = q.shape_expr[0], ref_k.shape_expr
        params = trtp.KernelLaunchParams(
            grid_x=-(-queries // kernel.block_queries),
            grid_y=samples * num_heads,
            grid_z=rows // samples,
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        return kernel.entry, kernel.ptx, params, trtp.SymExprs.from_tuple((reference_tokens,))
