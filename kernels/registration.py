"""Registers operators so that `torch.onnx.export` emits each as one node with a model-local function.

The exporter keeps a custom torch op as one node if `onnx.defs` knows its schema and a translation emits the node. The
same file defines the node as a `FunctionProto`, so a runtime without our kernel inlines standard operators instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnxscript
import torch

DOMAIN = "moma"
DOMAIN_VERSION = 1
STANDARD_OPSET = 23
# The attribute by which TensorRT's parser looks up a node's plugin.
PLUGIN_NAMESPACE = "plugin_namespace"


@dataclass(frozen=True)
class OnnxOperator:
    """An operator in ONNX: its schema, its function of standard operators, and the translation from its torch op."""

    torch_op: torch._ops.OpOverload
    schema: onnx.defs.OpSchema
    function: onnx.FunctionProto
    translation: Callable[..., Any]


def make_schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], doc: str) -> onnx.defs.OpSchema:
    """Make a schema over floating-point tensors, with the three attributes that both operators have.

    `num_heads` is the number of heads; `softmax_scale`, 1/√(head width), is the factor of q·k. The latter follows from
    the former and the width, but a function body cannot compute an attribute. `plugin_namespace` does not affect the
    result: if it is set, TensorRT uses the plugin registered there in place of the function; other runtimes inline the
    function.
    """
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kind = onnx.defs.OpSchema.AttrType
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        doc=doc,
        inputs=[parameter(name, "T") for name in inputs],
        outputs=[parameter(name, "T") for name in outputs],
        attributes=[
            attribute("num_heads", kind.INT, required=True),
            attribute("softmax_scale", kind.FLOAT, required=True),
            attribute(PLUGIN_NAMESPACE, kind.STRING, required=False),
        ],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "floating point")],
    )


def register_schema(schema: onnx.defs.OpSchema) -> None:
    """Register a schema in this process; the exporter refuses operators that it cannot look up."""
    if not onnx.defs.has(schema.name, schema.domain):
        onnx.defs.register_schema(schema)


def parse_function(text: str) -> onnx.FunctionProto:
    """Parse a function in ONNX's textual form; adds this domain's opsets and the `plugin_namespace` attribute."""
    header = f'<opset_import: ["" : {STANDARD_OPSET}], domain: "{DOMAIN}">\n'
    function = onnx.parser.parse_function(header + text)
    # A node may only have attributes that its function declares. Those with a default may be omitted.
    function.attribute_proto.append(onnx.helper.make_attribute(PLUGIN_NAMESPACE, DOMAIN))
    return function


def make_translation(name: str) -> Callable[..., Any]:
    """Make the exporter's translation of a torch op whose arguments are tensors and, last, `num_heads`."""

    def translate(*arguments: Any) -> Any:
        *tensors, num_heads = arguments
        softmax_scale = (tensors[0].shape[-1] // num_heads) ** -0.5
        emit = getattr(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), name)
        return emit(*tensors, num_heads=num_heads, softmax_scale=softmax_scale, **{PLUGIN_NAMESPACE: DOMAIN})

    return translate
