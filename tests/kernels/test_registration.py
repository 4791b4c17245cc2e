from types import SimpleNamespace

import onnx
import onnx.inliner
import pytest
import torch

from kernels.operators import onnx_operators
from kernels.registration import DOMAIN, PLUGIN_NAMESPACE, make_translation, register_schema


@pytest.mark.parametrize("operator", onnx_operators(), ids=lambda o: o.schema.name)
def test_schema_function_and_torch_operator_agree(operator):
    assert operator.function.domain == operator.schema.domain == DOMAIN
    assert operator.function.name == operator.schema.name
    assert list(operator.function.input) == [i.name for i in operator.schema.inputs]
    assert list(operator.function.output) == [o.name for o in operator.schema.outputs]
    required = {name for name, attribute in operator.schema.attributes.items() if attribute.required}
    assert set(operator.function.attribute) == required == {"num_heads", "softmax_scale"}
    (optional,) = operator.function.attribute_proto
    assert {*required, optional.name} == set(operator.schema.attributes)
    assert (optional.name, optional.s) == (PLUGIN_NAMESPACE, DOMAIN.encode())
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
    assert seen == {"num_heads": 8, "softmax_scale": pytest.approx(40**-0.5), "plugin_namespace": "moma"}


def test_the_exporter_keeps_one_node(exported):
    for operator in onnx_operators():
        model = exported(SimpleNamespace(_opoverload=operator.torch_op))
        (node,) = model.graph.node
        assert (node.domain, node.op_type) == (DOMAIN, operator.schema.name)
        assert list(node.input) == [i.name for i in operator.schema.inputs]
        assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
            "num_heads": 8,
            "softmax_scale": 0.5,
            "plugin_namespace": b"moma",
        }
        # Every axis but the channels is dynamic.
        rows = [axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim]
        assert rows == [0, 0, 32]
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("operator", onnx_operators(), ids=lambda o: o.schema.name)
def test_the_plugin_namespace_does_not_change_the_computation(exported, operator):
    inlined = []
    for namespace in ("moma", "another", None):
        model = exported(SimpleNamespace(_opoverload=operator.torch_op))
        (node,) = model.graph.node
        (attribute,) = (a for a in node.attribute if a.name == PLUGIN_NAMESPACE)
        if namespace is None:
            node.attribute.remove(attribute)
        else:
            attribute.s = namespace.encode()
        onnx.checker.check_model(model, full_check=True)
        inlined.append(onnx.inliner.inline_local_functions(model).SerializeToString(deterministic=True))
    assert len(set(inlined)) == 1


def test_torch_export_keeps_the_operators_with_symbolic_shapes():
    class Both(torch.nn.Module):
        def forward(self, q, ref, gate, scale, weights):
            own = torch.ops.moma.injected_self_attention(q, q, q, ref, ref, ref[..., 0], gate, scale, 2)
            return torch.ops.moma.context_cross_attention(own, q, q, q, q, gate, weights, 2)

    rows, samples, queries, references = (
        torch.export.Dim(name, max=64) for name in ("rows", "samples", "queries", "n")
    )
    per_query = {0: samples, 1: queries}
    program = torch.export.export(
        Both(),
        (torch.rand(4, 5, 8), torch.rand(2, 7, 8), torch.rand(2, 5), torch.rand(1), torch.rand(2, 5)),
        dynamic_shapes=({0: rows, 1: queries}, {0: samples, 1: references}, per_query, {}, per_query),
    )
    targets = [node.target for node in program.graph.nodes if getattr(node.target, "namespace", "") == "moma"]
    assert targets == [operator.torch_op for operator in onnx_operators()]
    q, *_ = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    out, saliency = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert out.shape == q.shape
    assert saliency.shape == q.shape[:2]
    assert isinstance(out.shape[0], torch.SymInt)
    # Sizes and a number of groups that tracing never saw.
    inputs = (torch.rand(3, 9, 8), torch.rand(3, 4, 8), torch.rand(3, 9), torch.rand(1), torch.rand(3, 9))
    for found, wanted in zip(program.module()(*inputs), Both()(*inputs), strict=True):
        assert torch.equal(found, wanted)
