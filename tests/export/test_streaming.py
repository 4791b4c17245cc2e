"""The language model exported from placeholders: its weights, its outputs, and how many weights are in memory."""

import dataclasses
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engines.tensorrt import EngineRequest, build_engine
from export import network_weights
from export.checkpoints.model import LANGUAGE, Checkpoint, Component
from export.checkpoints.synthetic import random_component
from export.geometry import geometry_of
from export.network_weights import WEIGHTS_NAME, ExternalWeights, weight_groups
from export.networks import NETWORKS
from export.onnx_export import LOWERED_NAME, MODEL_NAME, ExportRequest, export_network
from export.quantize import BLOCK, dequantize, quantize
from export.sample_inputs import sample_inputs
from moma_rt.backends.base import Array
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision

NETWORK = NETWORKS["language_model"]
LAYERS, WIDTH, INNER = 2, 128, 192
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QUANTIZED = {f"layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in PROJECTIONS}
NORMS = {f"layers.{i}.{norm}.weight" for i in range(LAYERS) for norm in ("input_layernorm", "post_attention_layernorm")}
NORMS |= {"norm.weight"}
KEPT = {"embed_tokens.weight", *(f"mapping.{part}_proj.weight" for part in ("gate", "up", "down")), *NORMS}
DTYPES = {Precision.FP32: "FLOAT", Precision.BF16: "BFLOAT16"}
ALL = pytest.mark.parametrize("precision", Precision, ids=lambda p: p.value)
# ONNX Runtime's CPU kernels have no bfloat16.
RUN = [p for p in Precision if p is not Precision.BF16]
# Bounds of the relative error of keys and values that the rounding of the weights causes.
ROUNDING = {
    Precision.FP32: (0.0, 0.0),
    Precision.FP16: (1e-5, 1e-3),
    Precision.INT8: (1e-3, 1e-2),
    Precision.INT4: (2e-2, 0.12),
}
SIZES = {"sequence": 21, "past": 0, "image_sequence": 8}


class Watch:
    """Lists which weights were read and quantized, and counts how many were alive at the same time."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.rounded: list[str] = []
        self.most_alive = 0
        self._alive: list[weakref.ref] = []

    def add(self, thing: object) -> None:
        self._alive.append(weakref.ref(thing))
        self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self._alive))

    def watched(self, component: Component) -> Component:
        def load(names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
            assert names is not None, "all weights at once"
            loaded = component.load(names)
            for name, tensor in loaded.items():
                self.read.append(name)
                self.add(tensor)
            return loaded

        return dataclasses.replace(component, load=load)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    """A language model just large enough that all scales are external tensors of the graph."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "mm_hidden_size": 64}
    language = random_component(LANGUAGE, {**tiny_checkpoint.language.config, **sizes}, 0)
    mapping = {"gate_proj": (96, WIDTH), "up_proj": (96, WIDTH), "down_proj": (1024, 96)}
    config = {**tiny_checkpoint.adapters.config, "language_width": WIDTH, "mapping_width": 96}

    def load(names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = {f"mapping.{n}.weight": torch.randn(s, generator=generator) * s[1] ** -0.5 for n, s in mapping.items()}
        return {name: made[name] for name in (made if names is None else names)}

    adapters = dataclasses.replace(tiny_checkpoint.adapters, config=config, load=load)
    return dataclasses.replace(tiny_checkpoint, language=language, adapters=adapters)


@pytest.fixture(scope="module")
def geometry(checkpoint) -> Geometry:
    return geometry_of(checkpoint)


@pytest.fixture(scope="module")
def exports(checkpoint, geometry, tmp_path_factory) -> dict[Precision, tuple[Path, Watch]]:
    """The folder of each precision, and the `Watch` of its export."""
    made = {}
    for precision in Precision:
        watch = Watch()
        watched = dataclasses.replace(
            checkpoint, language=watch.watched(checkpoint.language), adapters=watch.watched(checkpoint.adapters)
        )

        def rounded(weight, p, name, watch=watch):
            found = quantize(weight, p, name)
            watch.rounded.append(name)
            watch.add(found)
            return found

        folder = tmp_path_factory.mktemp(precision.value)
        (group,) = weight_groups(NETWORK, watched, geometry, precision)
        assert not watch.read
        place = folder / Path(group.location).parent
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network_weights, "quantize", rounded)
            group.write(place)
        seen = list(watch.read)
        weights = ExternalWeights(folder, (group.location,))
        # The graphs are beside the folder of the weights, where ONNX Runtime looks for them by itself.
        export_network(ExportRequest(watched, NETWORK, geometry, precision, weights), folder)
        assert watch.read == seen, "graphs read no checkpoint"
        made[precision] = folder, watch
    return made


def weights_bytes(folder: Path) -> int:
    (file,) = folder.glob(f"*/{WEIGHTS_NAME}")
    return file.stat().st_size


@pytest.fixture(scope="module")
def inputs(geometry) -> dict[str, Array]:
    return sample_inputs(NETWORK.spec(geometry), geometry, SIZES)


def run(path: Path, spec: NetworkSpec, inputs: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # By default it also rounds the activations that quantized weights are multiplied by to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {t.name: inputs[t.name].astype(t.dtype, copy=False) for t in spec.inputs})
    return dict(zip((t.name for t in spec.outputs), outputs, strict=True))


def torch_run(module: torch.nn.Module, spec: NetworkSpec, inputs: dict[str, Array]) -> dict[str, Array]:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(inputs[t.name].astype(t.dtype, copy=False)) for t in spec.inputs))
    return {t.name: output.numpy() for t, output in zip(spec.outputs, outputs, strict=True)}


def errors(found: dict[str, Array], expected: dict[str, Array]) -> dict[str, float]:
    """The relative L2 error of each output."""
    pairs = ((n, found[n].astype(np.float64), e.astype(np.float64)) for n, e in expected.items())
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in pairs}


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}


@ALL
def test_every_weight_is_read_once_and_freed(exports, precision):
    watch = exports[precision][1]
    assert sorted(watch.read) == sorted(QUANTIZED | KEPT)
    assert sorted(watch.rounded) == sorted(QUANTIZED if precision.is_weight_only else ())
    # The weight being written, its quantized values, and the next weight.
    assert watch.most_alive <= 3


@ALL
@pytest.mark.parametrize("graph", [MODEL_NAME, LOWERED_NAME])
def test_the_weights_in_the_graph(exports, precision, graph):
    folder = exports[precision][0]
    found = initializers(folder / graph)
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    kept = KEPT if precision.is_weight_only else KEPT | QUANTIZED
    # Norms of random weights are all ones, and equal tensors are merged.
    assert len(kept & found.keys() - NORMS) == len(kept - NORMS)
    for name in kept & found.keys():
        assert names[found[name].data_type] == DTYPES.get(precision, "FLOAT16"), name
    assert tuple(found["mapping.up_proj.weight"].dims) == (WIDTH, 96), "inputs, outputs"
    nodes = onnx.load(folder / graph, load_external_data=False).graph.node
    of_weights = [n for n in nodes if n.op_type in ("Transpose", "Cast") and n.input[0] in found]
    assert not of_weights, "weights are stored as they are multiplied"
    rounding = {n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear"}
    assert len(rounding) == (len(QUANTIZED) if precision.is_weight_only else 0)
    products = [n for n in nodes if n.op_type == "MatMul" and n.input[1] in rounding]
    assert len(products) == len(rounding)
    for node in rounding.values():
        values, scales = (found[name] for name in node.input)
        inputs, outputs = values.dims
        attributes = {a.name: a.i for a in node.attribute}
        assert names[values.data_type] == precision.value.upper()
        assert names[scales.data_type] == "FLOAT16"
        if precision is Precision.INT4:
            assert attributes == {"axis": 0, "block_size": BLOCK}
            assert list(scales.dims) == [inputs // BLOCK, outputs]
        else:
            assert attributes == {"axis": 1}
            assert list(scales.dims) == [outputs]


def test_the_files_are_as_small_as_the_weights(exports):
    size = {precision: weights_bytes(folder) for precision, (folder, _) in exports.items()}
    weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    kept = size[Precision.FP16] - 2 * weights
    for precision, bits in ((Precision.INT8, 8), (Precision.INT4, 4 + 16 / BLOCK)):
        assert size[precision] == pytest.approx(kept + weights * bits / 8, rel=0.02)


@pytest.mark.parametrize("precision", RUN, ids=lambda p: p.value)
def test_what_it_computes(exports, checkpoint, geometry, inputs, precision):
    """The error is at most twice that of PyTorch in the same dtype, against fp32 arithmetic on the graph's weights.

    The rounding error of those weights is within the bounds of the precision; it is largest for random weights.
    """
    held = dataclasses.replace(checkpoint, language=as_stored(checkpoint.language, precision))
    spec, plain = NETWORK.spec(geometry, precision), NETWORK.spec(geometry)
    exact = torch_run(NETWORK.module(held, geometry), plain, inputs)
    rounding = errors(exact, torch_run(NETWORK.module(checkpoint, geometry), plain, inputs))["new_kv"]
    pytorch = errors(torch_run(NETWORK.module(held, geometry, precision), spec, inputs), exact)
    for graph in (MODEL_NAME, LOWERED_NAME):
        found = errors(run(exports[precision][0] / graph, spec, inputs), exact)
        print(f"{precision.value} {graph}: {found}, PyTorch {pytorch}; of rounding {rounding}")
        for name, error in found.items():
            assert error <= (1e-5 if precision is Precision.FP32 else 2 * pytorch[name]), name
    lowest, highest = ROUNDING[precision]
    assert lowest <= rounding <= highest


def as_stored(language: Component, precision: Precision) -> Component:
    """Return the component with its weights rounded to the values in the graph of a precision."""
    dtype = torch.float32 if precision is Precision.FP32 else torch.float16

    def load(names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        stored = language.load(names)
        weights = {name: tensor.to(dtype).float() for name, tensor in stored.items()}
        for name in QUANTIZED & weights.keys() if precision.is_weight_only else ():
            weights[name] = dequantize(quantize(stored[name], precision, name)).float().T.contiguous()
        return weights

    return dataclasses.replace(language, load=load)


@pytest.mark.parametrize("precision", RUN, ids=lambda p: p.value)
@pytest.mark.parametrize("cut", [1, 12])
def test_a_cached_prefix_and_a_suffix_equal_one_pass(exports, geometry, inputs, precision, cut):
    path, spec = exports[precision][0] / MODEL_NAME, NETWORK.spec(geometry, precision)
    whole = run(path, spec, inputs)
    prefix, suffix = ({**inputs, **{n: inputs[n][:, part] for n in ("token_ids", "positions")}} for part in parts(cut))
    past = run(path, spec, prefix)["new_kv"]
    found = run(path, spec, {**suffix, "past_kv": past})
    found["new_kv"] = np.concatenate([past, found["new_kv"]], axis=3)
    assert max(errors(found, whole).values()) < (1e-5 if precision is Precision.FP32 else 2e-3)


def parts(cut: int) -> tuple[slice, slice]:
    return slice(None, cut), slice(cut, None)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8, Precision.INT4], ids=lambda p: p.value)
def test_tensorrt_rtx_compiles_it(exports, geometry, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    folder, spec = exports[precision][0], NETWORK.spec(geometry, precision)
    request = EngineRequest(Flavour.TENSORRT_RTX, (86, 89, 120), folder / MODEL_NAME, folder, spec)
    facts = build_engine(request, tmp_path, lambda _: None)
    assert facts.weight_bytes == pytest.approx(weights_bytes(folder), rel=0.02), "weights keep their quantized size"
