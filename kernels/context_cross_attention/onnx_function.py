"""`moma::ContextCrossAttention` in ONNX: schema, function body in standard operators, and exporter translation."""

from kernels.context_cross_attention.operator import context_cross_attention
from kernels.registration import OnnxOperator, make_schema, make_translation, parse_function

NAME = "ContextCrossAttention"
INPUTS = ("q", "text_k", "text_v", "context_k", "context_v", "gate", "subject_weights")

# The attention itself computes the saliency, so the probabilities are never materialized: every head is widened by 8
# columns, all zero in q and k; v's first one holds the subject weights. That column of the output is exactly
# Σ_t weight_t · probability_t. 8 columns keep the head width aligned for tensor cores; k and v must have one shape.
_TEXT = """
ContextCrossAttention <num_heads, softmax_scale>
  (q, text_k, text_v, context_k, context_v, gate, subject_weights) => (out, saliency)
{
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
  zero = Constant <value_float = 0.0> ()
  q_zero = CastLike (zero, q)

  query_rows = Shape <start = 0, end = 2> (q)
  q_extra_shape = Concat <axis = 0> (query_rows, heads, eight)
  q_extra = Expand (q_zero, q_extra_shape)
  q_heads = Reshape (q, by_head)
  q_wide = Concat <axis = -1> (q_heads, q_extra)
  q_by_head = Transpose <perm = [0, 2, 1, 3]> (q_wide)

  text_rows = Shape <start = 0, end = 2> (text_k)
  extra_shape = Concat <axis = 0> (text_rows, heads, eight)
  k_extra = Expand (q_zero, extra_shape)
  k_heads = Reshape (text_k, by_head)
  k_wide = Concat <axis = -1> (k_heads, k_extra)
  k_by_head = Transpose <perm = [0, 2, 1, 3]> (k_wide)

  column = Constant <value_floats = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]> ()
  column_typed = CastLike (column, q)
  weights_typed = CastLike (subject_weights, q)
  weights_gt = Gather <axis = 0> (weights_typed, rows)
  last_two = Constant <value_ints = [2, 3]> ()
  weights_gt11 = Unsqueeze (weights_gt, last_two)
  weights_gt18 = Mul (weights_gt11, column_typed)
  v_extra = Expand (weights_gt18, extra_shape)
  v_heads = Reshape (text_v, by_head)
  v_wide = Concat <axis = -1> (v_heads, v_extra)
  v_by_head = Transpose <perm = [0, 2, 1, 3]> (v_wide)

  both_by_head = Attention <scale: float = @softmax_scale> (q_by_head, k_by_head, v_by_head)
  both_wide = Transpose <perm = [0, 2, 1, 3]> (both_by_head)
  start = Constant <value_ints = [0]> ()
  width_end = Constant <value_ints = [-8]> ()
  column_end = Constant <value_ints = [-7]> ()
  axis = Constant <value_ints = [3]> ()
  text_heads = Slice (both_wide, start, width_end, axis)
  text = Reshape (text_heads, flat)
  saliency_heads = Slice (both_wide, width_end, column_end, axis)
  saliency = ReduceMean <keepdims = 0> (saliency_heads, last_two)

  context = Attention
    <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @softmax_scale>
    (q, context_k, context_v)
  gate_typed = CastLike (gate, q)
  gate_gs = Gather <axis = 0> (gate_typed, rows)
  gate_gs1 = Unsqueeze (gate_gs, rest)
  weighted = Mul (context, gate_gs1)
  out = Add (text, weighted)
}
"""


def onnx_operator() -> OnnxOperator:
    """Return what an export needs to keep this operator as one node."""
    return OnnxOperator(
        torch_op=context_cross_attention._opoverload,
        schema=make_schema(NAME, INPUTS, ("out", "saliency"), "Decoupled cross-attention with subject saliency."),
        function=parse_function(_TEXT),
        translation=make_translation(NAME),
    )
