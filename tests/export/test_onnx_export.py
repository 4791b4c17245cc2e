"""The exported graphs of the synthetic checkpoint: what they contain, and that they compute what PyTorch does."""

import collections
import functools
import getpass
import json
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx import TensorProto

from export.checkpoints import CheckpointRequest, load_checkpoint, roles_for
from export.geometry import geometry_of
from export.network_weights import ExternalWeights, WeightGroup, weight_groups
from export.networks import NETWORKS
from export.onnx_export import ExportRequest, export_network
from moma_rt.backends.onnxruntime import OnnxRuntimeBackend
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Dim, Precision
from moma_rt.memory.networks import Networks
from moma_rt.schedulers.tables import schedule
from moma_rt.timing import StageTimer

DTYPES = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32, "uint8": onnx.TensorProto.UINT8}
OPERATORS = {"InjectedSelfAttention", "ContextCrossAttention"}
# Bytes from which a tensor must be external; and, for any network, the limits of inline tensors and of a graph file.
LARGE, INLINE, GRAPH = 4096, 1 << 16, 1 << 20


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def graphs(bundle):
    """Path and graph of each network, without the weights."""
    paths = {name: bundle.path(entry.onnx) for name, entry in bundle.manifest.networks.items()}
    return {name: (path, onnx.load(path, load_external_data=False)) for name, path in paths.items()}


def test_the_bundle_has_every_network(bundle, tiny_geometry):
    assert list(bundle.manifest.networks) == list(NETWORKS)
    assert bundle.manifest.geometry == tiny_geometry


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_has_the_specs_tensors(graphs, tmp_path, tiny_geometry, name):
    path, model = graphs[name]
    # A copy: onnx's own loader refuses hard links, which a bundle's files are, and looks for weights only beside the
    # graph.
    beside = Path(shutil.copytree(path.parents[2] / "weights", tmp_path / name))
    onnx.checker.check_model(shutil.copy(path, beside))
    spec = NETWORKS[name].spec(tiny_geometry)
    assert model.graph.name == name
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            found = value.type.tensor_type
            assert found.elem_type == DTYPES[tensor.dtype], value.name
            shape = [d.dim_param or d.dim_value for d in found.shape.dim]
            assert shape == [d.name if isinstance(d, Dim) else d for d in tensor.shape], value.name


@pytest.mark.parametrize("name", NETWORKS)
def test_our_operators_are_nodes_with_their_functions(graphs, name):
    model = graphs[name][1]
    nodes = collections.Counter(node.op_type for node in model.graph.node if node.domain == "moma")
    functions = {function.name for function in model.functions if function.domain == "moma"}
    expected = dict.fromkeys(OPERATORS, 16) if name == "denoiser" else {}
    assert nodes == expected
    assert functions == set(expected)
    assert len(model.functions) == len(expected)
    imports = {opset.domain for opset in model.opset_import}
    assert imports == ({"", "moma"} if expected else {""})
    for function in model.functions:
        assert all(node.domain == "" for node in function.node), "a function must run on standard operators alone"
        assert [attribute.name for attribute in function.attribute_proto] == ["plugin_namespace"]
    namespaces = {
        a.s for node in model.graph.node if node.domain for a in node.attribute if a.name == "plugin_namespace"
    }
    assert namespaces == ({b"moma"} if expected else set())


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_of_the_machine_is_in_the_file(graphs, repository, name):
    path, model = graphs[name]
    content = path.read_bytes()
    places = [str(repository), str(Path.home()), sysconfig.get_paths()["purelib"], str(path.parent.parent)]
    for text in (*places, "site-packages", "Traceback", "stack_trace", '.py"', ".py:", "line "):
        assert text == "/" or text.encode() not in content, text
    assert model.doc_string == ""
    assert not model.metadata_props
    assert all(not node.doc_string and not node.metadata_props for node in model.graph.node)
    assert getpass.getuser() not in model.producer_name


def references(graph: onnx.GraphProto) -> dict[str, dict[str, str]]:
    """Return the location, offset and length of each external tensor."""
    outside = (tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in outside}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("file", ["onnx", "lowered"])
def test_references_are_to_the_modules_own_tensors(bundle, modules, name, file):
    entry, state = bundle.network(name), modules(name).state_dict()
    graph = onnx.load(bundle.path(getattr(entry, file)), load_external_data=False).graph
    contents = {weights.removeprefix("weights/"): bundle.path(weights).read_bytes() for weights in entry.weights}
    found, dims = references(graph), {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert found
    for tensor, reference in found.items():
        assert reference.keys() == {"location", "offset", "length"}
        begin, length = int(reference["offset"]), int(reference["length"])
        assert dims[tensor] == tuple(state[tensor].shape)
        content = contents[reference["location"]][begin : begin + length]
        assert content == state[tensor].numpy().tobytes(), tensor
    # Every file is referred to, and every large tensor is external.
    assert {reference["location"] for reference in found.values()} == contents.keys()
    assert all(name in found for name, tensor in state.items() if tensor.nbytes >= LARGE and name in dims)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("file", ["onnx", "lowered"])
def test_no_weight_is_in_a_graph(bundle, modules, name, file):
    """Folded constants may be, such as the part of an embedding that every run looks up."""
    path = bundle.path(getattr(bundle.network(name), file))
    graph = onnx.load(path, load_external_data=False).graph
    inline = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    assert not inline.keys() & modules(name).state_dict().keys()
    sizes = {tensor: onnx.numpy_helper.to_array(proto).nbytes for tensor, proto in inline.items()}
    print(f"{name} {file}: {path.stat().st_size} bytes, of which tensors {sum(sizes.values())}")
    assert sum(sizes.values()) < INLINE, sizes
    assert path.stat().st_size < GRAPH


def without_content(group: WeightGroup, root: Path) -> None:
    """Write a group's file of its full size, as a sparse file of zeros."""
    path = root / group.location
    path.parent.mkdir(parents=True)
    header, end = {}, 0
    for tensor in group.tensors:
        header[tensor.name] = {**tensor.described, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder", "vae_decoder", "denoiser", "subject_encoder"])
def test_graphs_at_full_size_are_small(tmp_path, name):
    """Nothing of SD1.5's 1.7 GB is in a graph, and tracing needs none of it in memory."""
    checkpoint = load_checkpoint(CheckpointRequest("sd15", weights="random", roles=roles_for([name])))
    geometry, network = geometry_of(checkpoint), NETWORKS[name]
    groups = weight_groups(network, checkpoint, geometry, Precision.FP16)
    for group in groups:
        without_content(group, tmp_path / "weights")
    external = ExternalWeights(tmp_path / "weights", tuple(group.location for group in groups))
    export_network(ExportRequest(checkpoint, network, geometry, Precision.FP16, external), tmp_path)
    for file in ("model.onnx", "lowered.onnx"):
        graph = onnx.load(tmp_path / file, load_external_data=False).graph
        inline = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL]
        size = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in inline)
        print(f"{name} {file}: {(tmp_path / file).stat().st_size} bytes, of which tensors {size}")
        assert size < INLINE
        assert (tmp_path / file).stat().st_size < GRAPH


def sizes_of_case(batch: int, guided: int, reference: int) -> dict[str, int]:
    grids = {f"reference_tokens_{grid}": max(1, min(reference, grid * grid)) for grid in (32, 16, 8, 4)}
    return {"batch": batch, "guided_batch": batch * guided, **grids}


SIZES = [
    *(("text_encoder", {"guided_batch": batch}) for batch in (1, 2, 3, 8)),
    ("vae_encoder", {}),
    ("subject_encoder", {}),
    ("vision_encoder", {}),
    *(
        ("language_model", {"sequence": sequence, "past": past, "image_sequence": images})
        for sequence, past, images in ((1, 0, 1), (90, 0, 64), (1, 70, 1), (3, 2, 64), (64, 7, 64))
    ),
    *(("context_projector", {"batch": batch}) for batch in (1, 3, 4)),
    *(("denoiser", sizes_of_case(*case)) for case in ((1, 1, 37), (1, 2, 1024), (3, 1, 1), (3, 2, 5))),
    *(("vae_decoder", {"batch": batch}) for batch in (1, 3)),
]


def inputs_of(name: str, spec, sizes: dict[str, int], language) -> dict[str, np.ndarray]:
    """Random values in each input's range."""
    generator = np.random.default_rng(0)
    inputs = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(**sizes)
        if tensor.name == "token_ids":
            inputs[tensor.name] = generator.integers(0, language.vocabulary, shape, np.int32)
        elif tensor.name.startswith("object_mask"):
            inputs[tensor.name] = generator.integers(0, 2, shape).astype(np.float32)
            # The operator needs at least one token; the last sample has only one.
            inputs[tensor.name][-1] = 0.0
            inputs[tensor.name][:, -1] = 1.0
        elif tensor.name in ("strength", "foreground_mask", "image"):
            inputs[tensor.name] = generator.random(shape, np.float32)
        else:
            inputs[tensor.name] = generator.standard_normal(shape, np.float32)
    if name == "language_model":
        images = np.arange(min(sizes["image_sequence"], sizes["sequence"] - 1))
        inputs["token_ids"][0, : len(images)] = language.vocabulary + images
        inputs["positions"] = np.arange(sizes["past"], sizes["past"] + sizes["sequence"], dtype=np.int32)[None]
    if name == "denoiser":
        inputs["schedule_row"] = schedule("ddim", 20, 7.5)[10]
        inputs["subject_weights"] = np.zeros_like(inputs["subject_weights"])
        inputs["subject_weights"][:, [3, 9]] = 1.0
    return inputs


@pytest.fixture(scope="module")
def networks(bundle):
    return Networks(bundle, OnnxRuntimeBackend(2))


@pytest.fixture(scope="module")
def modules(tiny_checkpoint, tiny_geometry):
    return functools.cache(lambda name: NETWORKS[name].module(tiny_checkpoint, tiny_geometry))


def case_id(value) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "fixed"


@pytest.mark.parametrize(("name", "sizes"), SIZES, ids=case_id)
def test_onnx_runtime_agrees_with_pytorch(networks, modules, tiny_geometry, name, sizes):
    spec = NETWORKS[name].spec(tiny_geometry)
    inputs = inputs_of(name, spec, sizes, tiny_geometry.language)
    found = networks.run(name, inputs, StageTimer())
    flat = tuple(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs)
    with torch.inference_mode():
        expected = modules(name)(*NETWORKS[name].arguments(flat, tiny_geometry))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for tensor, values in zip(spec.outputs, expected, strict=True):
        assert found[tensor.name].dtype == tensor.dtype
        assert tuple(values.shape) == found[tensor.name].shape == tensor.resolve(**sizes)
        if tensor.dtype == "uint8":
            assert np.abs(found[tensor.name].astype(int) - values.numpy().astype(int)).max() <= 1
            assert len(np.unique(found[tensor.name])) > 50
        elif tensor.name == "next_history":
            # DDIM keeps no history: its columns are zero.
            assert not found[tensor.name].any()
        else:
            a, b = found[tensor.name].astype(np.float64), values.numpy().astype(np.float64)
            assert np.isfinite(a).all()
            assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b), tensor.name


def test_one_half_alone_is_the_conditional_half(networks, tiny_geometry):
    """One half cannot be guided: the result is that of both halves with a guidance scale of 1."""
    spec = NETWORKS["denoiser"].spec(tiny_geometry)
    both = inputs_of("denoiser", spec, sizes_of_case(3, 2, 9), tiny_geometry.language)
    alone = {**both, **{name: both[name][3:] for name in ("text_tokens", "context_tokens")}}
    found = networks.run("denoiser", alone, StageTimer())["next_latents"]
    guided_by_one = {**both, "schedule_row": schedule("ddim", 20, 1.0)[10]}
    expected = networks.run("denoiser", guided_by_one, StageTimer())["next_latents"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_padded_reference_tokens_change_nothing(networks, tiny_geometry):
    spec = NETWORKS["denoiser"].spec(tiny_geometry)
    inputs = inputs_of("denoiser", spec, sizes_of_case(1, 2, 6), tiny_geometry.language)
    for name in inputs:
        if name.startswith("object_mask"):
            inputs[name][:] = 1.0
    padded = dict(inputs)
    for name, array in inputs.items():
        if name.startswith("object_mask"):
            padded[name] = np.pad(array, ((0, 0), (0, 3)))
        elif name.startswith("reference_"):
            padded[name] = np.pad(array, ((0, 0), (0, 3), (0, 0)), constant_values=50.0)
    found, expected = (networks.run("denoiser", i, StageTimer()) for i in (padded, inputs))
    for name in ("next_latents", "next_foreground_mask"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
