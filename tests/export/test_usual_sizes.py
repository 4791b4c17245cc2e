"""Packages are traced at sizes that tracing can tell apart, and tuned for one picture with both halves of guidance."""

import pytest
import torch

from export.networks import NETWORKS
from export.packages import PackageRequest, quiet, tune_for_usual_sizes
from export.tracing import tracing_arguments
from moma_rt.bundle.specs import Precision


@pytest.mark.parametrize("name", ["text_encoder", "language_model", "vae_decoder"])
def test_kernels_are_tuned_for_the_optimum_of_every_size(tiny_checkpoint, tiny_geometry, name):
    request = PackageRequest(tiny_checkpoint, NETWORKS[name], tiny_geometry, Precision.FP32, 0)
    spec = request.network.spec(tiny_geometry)
    arguments, shapes = tracing_arguments(request.network, spec, tiny_geometry, "meta")
    with quiet():
        program = torch.export.export(request.structure(), arguments, dynamic_shapes=shapes)
    tune_for_usual_sizes(program, spec)
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for user_input, tensor in zip(program.graph_signature.user_inputs, spec.inputs, strict=True):
        for axis, dim in tensor.dynamic_axes.items():
            size = nodes[user_input].shape[axis].node
            # Inductor takes its own hints from these.
            found[dim.name] = size.shape_env.var_to_hint_override[size.expr]
            assert size.shape_env.backed_var_to_val[size.expr] != 1, "tracing takes 1 for a constant"
    wanted = {dim.name: dim.opt for tensor in spec.inputs for dim in tensor.dynamic_axes.values()}
    assert found == wanted
    assert wanted.items() >= {"text_encoder": {"guided_batch": 2}, "vae_decoder": {"batch": 1}}.get(name, {}).items()
