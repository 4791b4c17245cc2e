"""What an operator needs to pass through `torch.onnx.export` as one node with a model-local function.

The exporter keeps a custom torch op whole when the op's ONNX schema is known to `onnx.defs` and a translation emits
the node; the node's meaning then travels in the same file as a `FunctionProto`, so that every runtime without our
kernel inlines standard operators instead.
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
# The attribute by which TensorRT's parser looks a node's plugin up.
PLUGIN_NAMESPACE = "plugin_namespace"


@dataclass(frozen=True)
class OnnxOperator:
    """One operator's ONNX side: its schema, its meaning in standard operators, and the torch op it translates."""

    torch_op: torch._ops.OpOverload
    schema: onnx.defs.OpSchema
    function: onnx.FunctionProto
    translation: Callable[..., Any]


def make_schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], doc: str) -> onnx.defs.OpSchema:
    """A schema over floating-point tensors, with the three attributes both operators have.

    `num_heads` is the number of heads; `softmax_scale` is what q·k is multiplied by, 1/√(head width). The latter
    follows from the former and the width, but a function's body has no way to compute an attribute.
    `plugin_namespace` has no part in the meaning: where it is given, TensorRT takes the plugin registered there in
    place of the function, and everything else inlines the function.
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
    """Make a schema known to this process; the exporter refuses operators it cannot look up."""
    if not onnx.defs.has(schema.name, schema.domain):
        onnx.defs.register_schema(schema)


def parse_function(text: str) -> onnx.FunctionProto:
    """A function from ONNX's textual form, with this domain's opsets and the attribute without a part in it."""
    header = f'<opset_import: ["" : {STANDARD_OPSET}], domain: "{DOMAIN}">\n'
    function = onnx.parser.parse_function(header + text)
    # A node may have no attribute that its function does not declare; one with a default may be left out.
    function.attribute_proto.append(onnx.helper.make_attribute(PLUGIN_NAMESPACE, DOMAIN))
    return function


def make_translation(name: str) -> Callable[..., Any]:
    """What the exporter calls for a torch op whose arguments are tensors and, last, `num_heads`."""

    def translate(*arguments: Any) -> Any:
        *tensors, num_heads = arguments
        softmax_scale = (tensors[0].shape[-1] // num_heads) ** -0.5
        emit = getattr(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), name)
        return emit(*tensors, num_heads=num_heads, softmax_scale=softmax_scale, **{PLUGIN_NAMESPACE: DOMAIN})

    return translate
