"""Export one network to ONNX: its spec's names and axes, MoMA's operators as functions, weights in external files."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch

from export.checkpoints.model import Checkpoint
from export.lowering import write_lowered
from export.network_weights import ExternalWeights
from export.networks import Network
from export.streaming import quantize_weights
from export.tracing import tracing_arguments
from kernels.operators import onnx_operators
from kernels.registration import DOMAIN, DOMAIN_VERSION, STANDARD_OPSET, OnnxOperator, register_schema
from moma_rt.bundle.specs import Dim, Geometry, NetworkSpec, Precision

MODEL_NAME = "model.onnx"
LOWERED_NAME = "lowered.onnx"


@dataclass(frozen=True)
class ExportRequest:
    """A network to trace, and the files that hold its weights; the checkpoint's own weights are not read."""

    checkpoint: Checkpoint
    network: Network
    geometry: Geometry
    precision: Precision
    weights: ExternalWeights


def export_network(request: ExportRequest, folder: Path) -> None:
    """Write `folder/model.onnx`, with the spec's names and dynamic axes, and `folder/lowered.onnx`.

    Both refer to the weights files by paths relative to `request.weights.root`.
    """
    network, precision = request.network, request.precision
    module = network.structure(request.checkpoint, request.geometry, precision)
    spec = network.spec(request.geometry, precision)
    operators = onnx_operators()
    for operator in operators:
        register_schema(operator.schema)
    arguments, shapes = tracing_arguments(network, spec, request.geometry, "meta")
    with warnings.catch_warnings(), torch.inference_mode():
        # The exporter warns about optional packages and about axes that share a size, as the specs intend.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=STANDARD_OPSET,
            dynamic_shapes=shapes,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            custom_translation_table={operator.torch_op: operator.translation for operator in operators},
            verbose=False,
            optimize=False,
        )
    assert program is not None
    request.weights.map_into(program.model)
    program.optimize()
    if precision.is_weight_only and network.source is not None:
        quantize_weights(program.model, network.source(request.checkpoint), precision)
    request.weights.refer(program.model)
    _finish(program.model, spec, operators)
    # Constants folded from weights, such as a part of an embedding, are small and stay in the graph itself.
    (folder / MODEL_NAME).write_bytes(onnx_ir.to_proto(program.model).SerializeToString(deterministic=True))
    write_lowered(folder / MODEL_NAME, folder / LOWERED_NAME)


def drop_metadata(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes about the exporting machine, such as stack traces with its paths."""
    graph = model.graph
    for holder in (model, graph, *graph.all_nodes(), *graph.initializers.values()):
        holder.metadata_props.clear()
        holder.doc_string = None
    for value in (*graph.inputs, *graph.outputs, *(value for node in graph.all_nodes() for value in node.outputs)):
        value.metadata_props.clear()


def _finish(model: onnx_ir.Model, spec: NetworkSpec, operators: tuple[OnnxOperator, ...]) -> None:
    """Add the functions that the graph uses, name its axes, and drop metadata about the exporting machine."""
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for operator in operators:
        if operator.schema.name in used:
            function = onnx_ir.serde.deserialize_function(operator.function)
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = DOMAIN_VERSION
    model.graph.name = spec.name
    drop_metadata(model)
    public = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    for value in (value for node in model.graph.all_nodes() for value in node.outputs):
        # The exporter names values after torch's operators, which may clash with the spec's names.
        if value.name in public and not value.is_graph_output():
            value.name += "_value"
    for tensor, value in zip((*spec.inputs, *spec.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True):
        assert value.name == tensor.name, f"{spec.name}: the graph has {value.name} where the spec has {tensor.name}"
        value.shape = onnx_ir.Shape([d.name if isinstance(d, Dim) else d for d in tensor.shape])
