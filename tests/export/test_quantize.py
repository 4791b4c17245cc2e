"""Int8 and int4 weights: their layout, their error, and values that cannot be quantized."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import quantize as module
from export.quantize import BLOCK, dequantize, packed_int4, quantize
from moma_rt.bundle.specs import Precision
from moma_rt.errors import CheckpointError

INT8, INT4 = Precision.INT8, Precision.INT4
BOTH = pytest.mark.parametrize("precision", [INT8, INT4], ids=lambda p: p.value)
LIMITS = {INT8: (-128, 127), INT4: (-8, 7)}


def normal(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def dequantized(quantized: module.Quantized) -> torch.Tensor:
    """Return the dequantized matrix as a linear layer has it, [outputs, inputs], in float32."""
    return dequantize(quantized).float().T


@BOTH
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (63, 192), (111, 128)])
def test_shapes_and_ranges(precision, outputs, inputs):
    weight = normal(outputs, inputs)
    found = quantize(weight, precision, "w")
    assert (found.values_kn.shape, found.values_kn.dtype) == ((inputs, outputs), np.int8)
    assert found.scales.shape == ((outputs,) if precision is INT8 else (inputs // BLOCK, outputs))
    assert found.scales.dtype == np.float16
    assert (found.scales > 0).all()
    lowest, highest = LIMITS[precision]
    assert lowest <= found.values_kn.min() < 0 < found.values_kn.max() <= highest
    assert found.values_kn.flags.c_contiguous


def test_int8_is_off_by_half_a_step():
    weight = normal(63, 111) * torch.logspace(-3, 3, 63)[:, None]
    found = quantize(weight, INT8, "w")
    steps = weight.abs().amax(1, keepdim=True) / 127
    # Half a step; then float16 rounds the scale and the product, by 2^-11 of what may be 127 steps.
    assert ((dequantized(found) - weight).abs() <= steps * (0.5 + 127 * 2**-10)).all()


def test_int4_is_nearer_than_rounding_by_the_largest_weight():
    weight = normal(96, 512)
    blocks = weight.unflatten(1, (-1, BLOCK))
    scales = (blocks.abs().amax(2, keepdim=True) / 7).half().float()
    plain = ((blocks / scales).round() * scales).flatten(1)
    found = dequantized(quantize(weight, INT4, "w"))
    by_block = [(matrix - weight).unflatten(1, (-1, BLOCK)).square().sum(2) for matrix in (found, plain)]
    # The dequantized matrix is rounded to float16, hence the factor.
    assert (by_block[0] <= by_block[1] * 1.005).all(), "in no block is it worse"
    relative = [float((matrix - weight).norm() / weight.norm()) for matrix in (found, plain)]
    print(f"clipped {relative[0]:.4f}, plain {relative[1]:.4f}")
    assert relative[0] < 0.92 * relative[1]


def test_int4_has_a_scale_for_each_block_of_inputs():
    weight = normal(8, 3 * BLOCK)
    weight[:, BLOCK : 2 * BLOCK] *= 1000
    relative = (dequantized(quantize(weight, INT4, "w")) - weight).unflatten(1, (-1, BLOCK)).norm(dim=2)
    relative = relative / weight.unflatten(1, (-1, BLOCK)).norm(dim=2)
    assert (relative < 0.15).all(), "large weights in one block do not affect the others"


@BOTH
def test_zeros_stay_zeros(precision):
    weight = normal(4, 2 * BLOCK)
    weight[1] = 0
    weight[2, :BLOCK] = 0
    found = dequantized(quantize(weight, precision, "w"))
    assert not found[1].any()
    assert not found[2, :BLOCK].any()
    assert found[3].any()


@BOTH
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-4])
def test_weights_too_small_for_exact_scales(precision, size):
    """Scales below 6e-5 have fewer digits in float16, and below 3e-8 none: the error stays below the weights' size."""
    weight = normal(16, BLOCK) * size
    found = dequantized(quantize(weight, precision, "w"))
    assert found.isfinite().all()
    assert float((found - weight).norm()) <= 1.001 * float(weight.norm())


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_values_that_cannot_be_quantized_are_named(precision, value):
    weight = normal(5, 2 * BLOCK)
    weight[3, 100] = value
    with pytest.raises(CheckpointError, match=rf"^layers\.7\.mlp\.up_proj\.weight contains NaN.*{precision.value}$"):
        quantize(weight, precision, "layers.7.mlp.up_proj.weight")


def test_int4_needs_whole_blocks():
    with pytest.raises(CheckpointError, match=rf"w has 96 inputs; int4 takes a multiple of {BLOCK}"):
        quantize(normal(2, 96), INT4, "w")
    assert quantize(normal(2, 96), INT8, "w").values_kn.shape == (96, 2)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_stride(precision, dtype):
    weight = normal(2 * BLOCK, 48).to(dtype).t()
    untouched = weight.clone()
    found, expected = quantize(weight, precision, "w"), quantize(untouched.float().contiguous(), precision, "w")
    assert torch.equal(weight, untouched)
    assert np.array_equal(found.values_kn, expected.values_kn)
    assert np.array_equal(found.scales, expected.scales)


@BOTH
def test_chunks_change_nothing(precision, monkeypatch):
    weight = normal(37, 2 * BLOCK)
    whole = quantize(weight, precision, "w")
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 5 * 2 * BLOCK)
    parts = quantize(weight, precision, "w")
    assert np.array_equal(whole.values_kn, parts.values_kn)
    assert np.array_equal(whole.scales, parts.scales)


def test_packed_as_onnx_reads_it():
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    tensor = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=values.shape, raw_data=packed_int4(values).tobytes()
    )
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values)
    # -8 then -7: the first lies in the low half.
    assert packed_int4(values)[0] == 0x98


@BOTH
def test_dequantized_as_onnx_runtime_does(precision):
    quantized = quantize(normal(48, 2 * BLOCK), precision, "w")
    dtype = onnx.TensorProto.INT8 if precision is INT8 else onnx.TensorProto.INT4
    raw = quantized.values_kn if precision is INT8 else packed_int4(quantized.values_kn)
    values = onnx.TensorProto(name="v", data_type=dtype, dims=quantized.values_kn.shape, raw_data=raw.tobytes())
    attributes = {"axis": 1} if precision is INT8 else {"axis": 0, "block_size": BLOCK}
    node = onnx.helper.make_node("DequantizeLinear", ["v", "s"], ["w"], **attributes)
    output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT16, quantized.values_kn.shape)
    graph = onnx.helper.make_graph(
        [node], "g", [], [output], [values, onnx.numpy_helper.from_array(quantized.scales, "s")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0], dequantize(quantized).numpy())
