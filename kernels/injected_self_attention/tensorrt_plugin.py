"""`moma::InjectedSelfAttention` as a TensorRT plugin: output shapes, types, and kernel launch.

A quick deployable plugin with an ahead-of-time implementation, which TensorRT supports since 10.9: the builder copies
the kernel's PTX into the engine, which then runs without Python and without this file.
"""

import math
from collections.abc import Callable
from typing import Any

NAME = "InjectedSelfAttention"
_ID = f"moma::{NAME}"
_TENSORS = 9


def register(find: Callable[..., Any]) -> None:
    """Register the plugin with TensorRT in this process, where it must not be registered yet.

    TensorRT calls the functions below while it parses and compiles a graph. It inspects their signatures: every
    annotation must be a type, not a string, and all attributes are passed by position, in this order.

    Args:
        find: looks up the kernel for an operator name, TensorRT's dtype name (HALF, BF16), number of heads, head
            width, number of queries, and (). Returns an object with `entry`, `ptx`, `block_queries`, `threads` and
            `shared_bytes`. Its exceptions become TensorRT errors.

    Raises:
        ImportError: this version of TensorRT has no `tensorrt.plugin`.
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
