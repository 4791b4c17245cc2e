"""The table of networks: every name, shape and type a runtime relies on, written out."""

import dataclasses

import numpy as np
import pytest
import torch

from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint
from export.geometry import geometry_of
from export.networks import MAX_BATCH, MAX_LANGUAGE_TOKENS, NETWORKS, denoiser_arguments
from export.tracing import example_inputs
from moma_rt.bundle.specs import Dim, NetworkSpec, Precision, TensorSpec
from moma_rt.errors import CheckpointError

B, G = "batch 1..4", "guided_batch 1..8"
SEQUENCE = "sequence 1..2048"
SD15 = {
    "text_encoder": ({"token_ids": ("int32", G, 77)}, {"text_tokens": ("float32", G, 77, 768)}),
    "vae_encoder": (
        {"image": ("float32", 1, 3, 512, 512), "noise": ("float32", 1, 4, 64, 64)},
        {"latents": ("float32", 1, 4, 64, 64)},
    ),
    "vision_encoder": ({"pixels": ("float32", 1, 3, 336, 336)}, {"image_tokens": ("float32", 1, 576, 4096)}),
    "language_model": (
        {
            "token_ids": ("int32", 1, SEQUENCE),
            "image_tokens": ("float32", 1, "image_sequence 1..576", 4096),
            "positions": ("int32", 1, SEQUENCE),
            "past_kv": ("float32", 32, 2, 32, "past 0..2048", 128),
        },
        {"embedding": ("float32", 1, 1024), "new_kv": ("float32", 32, 2, 32, SEQUENCE, 128)},
    ),
    "context_projector": ({"embedding": ("float32", B, 1024)}, {"context_tokens": ("float32", B, 4, 768)}),
    "vae_decoder": (
        {"latents": ("float32", B, 4, 64, 64)},
        {"image": ("uint8", B, 512, 512, 3), "pixel_mean": ("float32", B)},
    ),
}
LATENTS, MASK = ("float32", B, 4, 64, 64), ("float32", B, 1, 64, 64)
# Layer, grid, width: in the adapter file's order.
LAYERS = [
    *((f"down_blocks.{block}.attentions.{i}", 64 >> block, 320 << block) for block in range(3) for i in range(2)),
    *(
        (f"up_blocks.{block}.attentions.{i}", 128 >> (4 - block), 2560 >> block)
        for block in (1, 2, 3)
        for i in range(3)
    ),
    ("mid_block.attentions.0", 8, 1280),
]


@pytest.fixture(scope="module")
def sd15():
    return geometry_of(load_checkpoint(CheckpointRequest("sd15", weights="random")))


def written(tensor: TensorSpec) -> tuple:
    return (tensor.dtype, *(f"{d.name} {d.min}..{d.max}" if isinstance(d, Dim) else d for d in tensor.shape))


def table(spec: NetworkSpec) -> tuple[dict, dict]:
    return {t.name: written(t) for t in spec.inputs}, {t.name: written(t) for t in spec.outputs}


@pytest.mark.parametrize("name", SD15)
def test_specs(sd15, name):
    spec = NETWORKS[name].spec(sd15)
    assert spec.name == name
    found, expected = table(spec), SD15[name]
    assert found == expected
    assert [list(side) for side in found] == [list(side) for side in expected]


def test_subject_encoder_spec(sd15):
    inputs, outputs = table(NETWORKS["subject_encoder"].spec(sd15))
    assert inputs == {
        "latents": ("float32", 1, 4, 64, 64),
        "noise": ("float32", 1, 4, 64, 64),
        "text_tokens": ("float32", 1, 77, 768),
    }
    expected = [(f"reference_{kind}.{n}", ("float32", 1, grid * grid, c)) for kind in "kv" for n, grid, c in LAYERS]
    assert list(outputs.items()) == expected


def test_denoiser_spec(sd15):
    inputs, outputs = table(NETWORKS["denoiser"].spec(sd15))
    assert list(inputs.items()) == [
        *((name, LATENTS) for name in ("latents", "history", "noise")),
        ("schedule_row", ("float32", 64)),
        ("strength", ("float32", B)),
        ("text_tokens", ("float32", G, 77, 768)),
        ("context_tokens", ("float32", G, 4, 768)),
        ("subject_weights", ("float32", B, 77)),
        ("foreground_mask", MASK),
        *((f"object_mask.{grid}", ("float32", B, tokens(grid))) for grid in (64, 32, 16, 8)),
        *((f"reference_{kind}.{n}", ("float32", B, tokens(grid), c)) for kind in "kv" for n, grid, c in LAYERS),
    ]
    assert outputs == {"next_latents": LATENTS, "next_history": LATENTS, "next_foreground_mask": MASK}


def tokens(grid: int) -> str:
    return f"reference_tokens_{grid} 1..{grid * grid}"


def test_every_network_has_roles_and_its_own_name(sd15):
    assert list(NETWORKS) == [n.name for n in NETWORKS.values()]
    assert set(NETWORKS) == set(NETWORK_ROLES) == {*SD15, "subject_encoder", "denoiser"}
    assert (MAX_BATCH, MAX_LANGUAGE_TOKENS) == (4, 2048)
    for network in NETWORKS.values():
        spec = network.spec(sd15)
        # No output has the name of an input, since both are bound by name.
        names = [t.name for t in (*spec.inputs, *spec.outputs)]
        assert len(set(names)) == len(names)
        for dim in {d for t in spec.inputs for d in t.dynamic_axes.values()}:
            assert dim.min <= dim.opt <= dim.max
        dims = {d.name: d for t in spec.inputs for d in t.dynamic_axes.values()}
        # Sizes of the outputs follow from the inputs; one name is one size everywhere.
        for tensor in (*spec.inputs, *spec.outputs):
            assert all(dims[d.name] == d for d in tensor.dynamic_axes.values())


@pytest.mark.parametrize("name", ["vision_encoder", "language_model"])
def test_without_a_language_model(sd15, name):
    with pytest.raises(CheckpointError, match="--mllm"):
        NETWORKS[name].spec(dataclasses.replace(sd15, language=None))


def test_the_denoisers_arguments_are_grouped(sd15):
    names = tuple(t.name for t in NETWORKS["denoiser"].spec(sd15).inputs)
    *fixed, masks, keys, values = denoiser_arguments(names, sd15)
    assert fixed == list(names[:9])
    assert masks == tuple(f"object_mask.{grid}" for grid in sd15.grids)
    assert keys == tuple(f"reference_k.{layer.name}" for layer in sd15.self_attention)
    assert values == tuple(f"reference_v.{layer.name}" for layer in sd15.self_attention)


@pytest.mark.parametrize("name", NETWORKS)
def test_example_inputs_are_what_tracing_needs(tiny_geometry, name):
    spec = NETWORKS[name].spec(tiny_geometry)
    sizes = {}
    for tensor, example in zip(spec.inputs, example_inputs(spec), strict=True):
        assert str(example.dtype).removeprefix("torch.") == tensor.dtype
        for axis, dim in tensor.dynamic_axes.items():
            assert sizes.setdefault(dim.name, example.shape[axis]) == example.shape[axis]
            assert dim.min <= example.shape[axis] <= dim.max
        assert tuple(example.shape) == tensor.resolve(**sizes)
    assert all(size > 1 for size in sizes.values())
    assert len(set(sizes.values())) == len(sizes), "tracing would take equal sizes for one"
    again = example_inputs(spec)
    assert all(np.array_equal(a, b) for a, b in zip(again, example_inputs(spec), strict=True))


def with_large_weight(component, name: str):
    """The component with 70,000, which float16 cannot hold, as the first value of one weight."""

    def load(names=None):
        state = component.load(names)
        if name in state:
            state[name].view(-1)[0] = 7e4
        return state

    return dataclasses.replace(component, load=load)


@pytest.mark.parametrize(
    ("network", "role", "name"),
    [
        ("vae_decoder", "vae", "decoder.conv_in.bias"),
        ("denoiser", "unet", "conv_in.weight"),
        ("subject_encoder", "adapters", "attention.mid_block.attentions.0.transformer_blocks.0.attn1.to_k_ip.weight"),
        ("language_model", "language", "norm.weight"),
    ],
)
def test_weights_beyond_the_precision_are_refused(tiny_checkpoint, tiny_geometry, network, role, name):
    component = getattr(tiny_checkpoint, role)
    checkpoint = dataclasses.replace(tiny_checkpoint, **{role: with_large_weight(component, name)})
    said = rf"{role} of {component.name}: {name} has weights of up to 7e\+04, but float16 ends at 65504"
    with pytest.raises(CheckpointError, match=said):
        NETWORKS[network].module(checkpoint, tiny_geometry, Precision.FP16)
    module = NETWORKS[network].module(checkpoint, tiny_geometry, Precision.BF16)
    assert max(float(t.max()) for t in module.state_dict().values() if t.dtype == torch.bfloat16) > 65504
