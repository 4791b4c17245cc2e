"""`moma::InjectedSelfAttention` in ONNX: schema, function body in standard operators, and exporter translation."""

from kernels.injected_self_attention.operator import injected_self_attention
from kernels.registration import OnnxOperator, make_schema, make_translation, parse_function

NAME = "InjectedSelfAttention"
INPUTS = ("q", "k", "v", "ref_k", "ref_v", "mask", "gate", "scale")

# The mask is folded into q·k: every head is widened by 8 columns, of which q's first is 1 and ref_k's first is 0 for
# a token inside the mask and -65504 (fp16's lowest) outside. So runtimes can use their fused kernels for unmasked
# attention, and a mask of [N] is never expanded to the [S, N] that ONNX Runtime's Attention would need. 8 columns keep
# the head width aligned for tensor cores; k and v must have the same shape. All guidance halves of a sample share its
# reference, so row g of G·B gathers sample g mod B: tiling would give TensorRT B·(G·B/B) rows, whose maximum it
# overestimates fourfold, and with it the memory of the whole network.
_TEXT = """
InjectedSelfAttention <num_heads, softmax_scale> (q, k, v, ref_k, ref_v, mask, gate, scale) => (out)
{
  own = Attention
    <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @softmax_scale>
    (q, k, v)

  guided_batch = Shape <start = 0, end = 1> (q)
  batch = Shape <start = 0, end = 1> (gate)
  zero_scalar = Constant <value_int: int = 0> ()
  one_scalar = Constant <value_int: int = 1> ()
  guided_scalar = Squeeze (guided_batch)
  all_rows = Range (zero_scalar, guided_scalar, one_scalar)
  rows = Mod (all_rows, batch)
  one = Constant <value_ints = [1]> ()

  heads_scalar = Constant <value_int: int = @num_heads> ()
  heads = Reshape (heads_scalar, one)
  keep_keep = Constant <value_ints = [0, 0]> ()
  rest = Constant <value_ints = [-1]> ()
  by_head = Concat <axis = 0> (keep_keep, heads, rest)
  flat = Concat <axis = 0> (keep_keep, rest)
  eight = Constant <value_ints = [8]> ()

  column = Constant <value_floats = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]> ()
  column_typed = CastLike (column, q)
  query_rows = Shape <start = 0, end = 2> (q)
  q_extra_shape = Concat <axis = 0> (query_rows, heads, eight)
  q_extra = Expand (column_typed, q_extra_shape)
  q_heads = Reshape (q, by_head)
  q_wide = Concat <axis = -1> (q_heads, q_extra)
  q_ghsw = Transpose <perm = [0, 2, 1, 3]> (q_wide)

  zero = Constant <value_float = 0.0> ()
  mask_zero = CastLike (zero, mask)
  q_zero = CastLike (zero, q)
  lowest = Constant <value_float = -65504.0> ()
  q_lowest = CastLike (lowest, q)
  outside_bn = Equal (mask, mask_zero)
  bias_bn = Where (outside_bn, q_lowest, q_zero)
  last_two = Constant <value_ints = [2, 3]> ()
  bias_bn11 = Unsqueeze (bias_bn, last_two)
  bias_bn18 = Mul (bias_bn11, column_typed)
  reference_rows = Shape <start = 0, end = 2> (ref_k)
  extra_shape = Concat <axis = 0> (reference_rows, heads, eight)
  k_extra = Expand (bias_bn18, extra_shape)
  v_extra = Expand (q_zero, extra_shape)
  k_heads = Reshape (ref_k, by_head)
  v_heads = Reshape (ref_v, by_head)
  k_wide = Concat <axis = -1> (k_heads, k_extra)
  v_wide = Concat <axis = -1> (v_heads, v_extra)
  k_bhnw = Transpose <perm = [0, 2, 1, 3]> (k_wide)
  v_bhnw = Transpose <perm = [0, 2, 1, 3]> (v_wide)
  k_ghnw = Gather <axis = 0> (k_bhnw, rows)
  v_ghnw = Gather <axis = 0> (v_bhnw, rows)

  injected_ghsw = Attention <scale: float = @softmax_scale> (q_ghsw, k_ghnw, v_ghnw)
  injected_wide = Transpose <perm = [0, 2, 1, 3]> (injected_ghsw)
  start = Constant <value_ints = [0]> ()
  end = Constant <value_ints = [-8]> ()
  axis = Constant <value_ints = [3]> ()
  injected_heads = Slice (injected_wide, start, end, axis)
  injected = Reshape (injected_heads, flat)

  weight_bs = Mul (gate, scale)
  weight_typed = CastLike (weight_bs, q)
  weight_gs = Gather <axis = 0> (weight_typed, rows)
  weight_gs1 = Unsqueeze (weight_gs, rest)
  weighted = Mul (injected, weight_gs1)
  out = Add (own, weighted)
}
"""


def onnx_operator() -> OnnxOperator:
    """Return what an export needs to keep this operator as one node."""
    return OnnxOperator(
        torch_op=injected_self_attention._opoverload,
        schema=make_schema(NAME, INPUTS, ("out",), "Self-attention with masked reference injection."),
        function=parse_function(_TEXT),
        translation=make_translation(NAME),
    )
