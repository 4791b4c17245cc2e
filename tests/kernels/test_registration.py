import onnx
import pytest
import torch

from kernels.operators import onnx_operators
from kernels.registration import DOMAIN, make_translation, register_schema


@pytest.mark.parametrize("operator", onnx_operators(), ids=lambda o: o.schema.name)
def test_schema_function_and_torch_operator_agree(operator):
    assert operator.function.domain == operator.schema.domain == DOMAIN
    assert operator.function.name == operator.schema.name
    assert list(operator.function.input) == [i.name for i in operator.schema.inputs]
    assert list(operator.function.output) == [o.name for o in operator.schema.outputs]
    assert set(operator.function.attribute) == set(operator.schema.attributes) == {"num_heads", "softmax_scale"}
    # The torch operator's last argument is num_heads; the others are the ONNX inputs, in order.
    arguments = [argument.name for argument in operator.torch_op._schema.arguments]
    assert len(arguments) == len(operator.schema.inputs) + 1
    assert arguments[-1] == "num_heads"


@pytest.mark.parametrize("operator", onnx_operators(), ids=lambda o: o.schema.name)
def test_a_function_uses_standard_operators_only(operator):
    for node in operator.function.node:
        assert node.domain == ""
        assert onnx.defs.has(node.op_type, max_inclusive_version=23, domain="")


def test_registering_twice_is_harmless():
    schema = onnx_operators()[0].schema
    register_schema(schema)
    register_schema(schema)
    assert onnx.defs.has(schema.name, DOMAIN)


def test_the_softmax_scale_follows_from_the_head_width(monkeypatch):
    seen = {}

    class Operators:
        def __init__(self, domain, version):
            assert domain == DOMAIN

        def Some(self, *tensors, **attributes):
            seen.update(attributes)

    monkeypatch.setattr("onnxscript.values.Opset", Operators)
    make_translation("Some")(torch.zeros(2, 5, 320), torch.zeros(1), 8)
    assert seen == {"num_heads": 8, "softmax_scale": pytest.approx(40**-0.5)}
