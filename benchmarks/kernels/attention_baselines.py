"""The baselines of both operators: the same functions, written as a PyTorch user would write them.

Each takes the operator's tensors as one tuple. In the baselines' favour, what does not change between steps, which is
the form of the object mask, is computed before the timing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.kernels.attention_cases import GROUPS, HEADS, Case, SelfCase
from kernels.context_cross_attention.reference import context_cross_attention

Inputs = tuple[Any, ...]
Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Baseline:
    """A baseline: a function, and `arguments`, which converts the operator's tensors to the function's."""

    name: str
    function: Callable[[Inputs], Outputs]
    arguments: Callable[[Inputs], Inputs] = tuple
    is_compiled: bool = False

    def prepare(self, inputs: Inputs) -> Call:
        """Return the call to measure. This or the first call raises whatever a failing compiler raises."""
        function = compiled(self.function) if self.is_compiled else self.function
        arguments = self.arguments(inputs)
        return lambda: function(arguments)


def baselines(case: Case) -> tuple[Baseline, ...]:
    """Return the baselines of a case; the first one is "sdpa"."""
    if not isinstance(case, SelfCase):
        return CROSS
    return PACKED_SELF if case.form == "packed" else MASKED_SELF


def compiled(function: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    """Compile `function` by torch.compile, for the shapes of its first call only."""
    # Compilations for other shapes would count towards the recompilation limit.
    torch.compiler.reset()
    return torch.compile(function, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


def worst_errors(found: Outputs, wanted: Outputs) -> list[float]:
    """Return the largest absolute error of each output."""
    return [float((f.float() - w).abs().max()) for f, w in zip(found, wanted, strict=True)]


def allowed_errors(case: Case, inputs: Inputs, wanted: Outputs) -> list[float]:
    """Return the allowed error of each output: twice that of "sdpa", and at least the rounding of the largest value."""
    plain = baselines(case)[0].prepare(inputs)()
    rounding = [torch.finfo(found.dtype).eps * float(w.abs().max()) for found, w in zip(plain, wanted, strict=True)]
    return [max(2 * error, least) for error, least in zip(worst_errors(plain, wanted), rounding, strict=True)]


def is_within(errors: list[float], allowed: list[float]) -> bool:
    """Return whether no error is too large or NaN."""
    return all(error <= limit for error, limit in zip(errors, allowed, strict=True))


def self_composition(inputs: Inputs) -> Outputs:
    """Compute `moma::InjectedSelfAttention`; the mask is None, or [G·B, 1, 1, N] to be added to the scores."""
    q_gsc, k_gsc, v_gsc, ref_k_bnc, ref_v_bnc, bias_g11n, gate_bs, scale = inputs
    injected = _attention(q_gsc, _for_all_groups(ref_k_bnc), _for_all_groups(ref_v_bnc), bias_g11n)
    return (_attention(q_gsc, k_gsc, v_gsc) + _for_all_groups(gate_bs * scale)[..., None] * injected,)


def flex_composition(inputs: Inputs) -> Outputs:
    """Compute `self_composition` with a BlockMask as mask, which skips fully masked blocks of tokens."""
    q_gsc, k_gsc, v_gsc, ref_k_bnc, ref_v_bnc, block_mask, gate_bs, scale = inputs
    ref_k_ghnd, ref_v_ghnd = (_by_head(_for_all_groups(t)) for t in (ref_k_bnc, ref_v_bnc))
    injected = flex_attention(_by_head(q_gsc), ref_k_ghnd, ref_v_ghnd, block_mask=block_mask)
    injected = injected.transpose(1, 2).flatten(2)
    return (_attention(q_gsc, k_gsc, v_gsc) + _for_all_groups(gate_bs * scale)[..., None] * injected,)


def cross_composition(inputs: Inputs) -> Outputs:
    """Compute `moma::ContextCrossAttention` with fused attention.

    Fused attention does not return its probabilities, so those of the saliency are computed separately.
    """
    q_gsc, text_k_gtc, text_v_gtc, context_k_gmc, context_v_gmc, gate_bs, weights_bt = inputs
    context_gsc = _attention(q_gsc, context_k_gmc, context_v_gmc)
    out = _attention(q_gsc, text_k_gtc, text_v_gtc) + _for_all_groups(gate_bs)[..., None] * context_gsc
    q_ghsd, k_ghtd = _by_head(q_gsc), _by_head(text_k_gtc)
    probabilities_ghst = (q_ghsd @ k_ghtd.mT * q_ghsd.shape[-1] ** -0.5).softmax(-1)
    return out, (probabilities_ghst * _for_all_groups(weights_bt)[:, None, None]).sum(-1).mean(1)


def cross_definition(inputs: Inputs) -> Outputs:
    """Compute the operator's definition, which uses the same probabilities for saliency and output."""
    return context_cross_attention(*inputs, HEADS)


def _attention(q_gsc: Tensor, k_gnc: Tensor, v_gnc: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (_by_head(t) for t in (q_gsc, k_gnc, v_gnc))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def _by_head(tensor_gsc: Tensor) -> Tensor:
    return tensor_gsc.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _for_all_groups(tensor_b: Tensor) -> Tensor:
    """[B, ...] → [G·B, ...]; without a copy where B is 1."""
    return tensor_b.expand(GROUPS, *tensor_b.shape).flatten(0, 1)


def _without_mask(inputs: Inputs) -> Inputs:
    return (*inputs[:5], None, *inputs[6:])


def _with_bias(inputs: Inputs) -> Inputs:
    mask_bn = inputs[5]
    bias_bn = torch.zeros_like(mask_bn).masked_fill(mask_bn == 0, torch.finfo(mask_bn.dtype).min)
    return (*inputs[:5], _for_all_groups(bias_bn)[:, None, None], *inputs[6:])


def _with_block_mask(inputs: Inputs) -> Inputs:
    keep_gn = _for_all_groups(inputs[5] != 0)
    rows, queries, _ = inputs[0].shape

    def keeps(row: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return keep_gn[row, token]

    block_mask = create_block_mask(keeps, rows, None, queries, keep_gn.shape[1], device=keep_gn.device.type)
    return (*inputs[:5], block_mask, *inputs[6:])


PACKED_SELF = (
    Baseline("sdpa", self_composition, _without_mask),
    Baseline("sdpa_compiled", self_composition, _without_mask, is_compiled=True),
)
MASKED_SELF = (
    Baseline("sdpa", self_composition, _with_bias),
    Baseline("sdpa_compiled", self_composition, _with_bias, is_compiled=True),
    Baseline("flex_compiled", flex_composition, _with_block_mask, is_compiled=True),
)
CROSS = (
    Baseline("sdpa", cross_composition),
    Baseline("definition", cross_definition),
    Baseline("sdpa_compiled", cross_composition, is_compiled=True),
    Baseline("definition_compiled", cross_definition, is_compiled=True),
)
