"""The last stage, a step each, from the data folder to checkpoints that the exporter opens."""

import argparse
import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from examples.mini_moma import context, joint
from examples.mini_moma import train as stage
from examples.mini_moma.model import MiniMoma
from examples.mini_moma.vae import make_vae
from export.checkpoints import CheckpointRequest, load_checkpoint
from moma_rt.errors import InputError


def options(data, **given):
    standard = {"steps": 1, "context_steps": 1, "processes": 1, "minutes": None, "write_only": False}
    return argparse.Namespace(data=data, out=data / "out" / "mini", **{**standard, **given})


@pytest.fixture
def with_vae(data):
    save_file({name: tensor.contiguous() for name, tensor in make_vae().state_dict().items()}, data / "vae.safetensors")
    return data


@pytest.mark.usefixtures("one_process")
def test_both_halves_and_the_checkpoints(with_vae, tokens, monkeypatch):
    for module in (context, joint):
        monkeypatch.setattr(module, "_PHOTOS", 2)
    torch.manual_seed(0)
    stage.run(options(with_vae))
    checkpoint = load_checkpoint(CheckpointRequest("mini", weights=str(with_vae / "out" / "mini")))
    assert checkpoint.image_size == 128
    average = torch.load(with_vae / "joint.checkpoint", weights_only=True)["average"]
    model = MiniMoma(tokens)
    model.load_state_dict({name[6:]: tensor for name, tensor in average.items() if name.startswith("model.")})
    assert torch.equal(checkpoint.unet.load()["conv_in.weight"], model.unet.conv_in.weight.half())
    # The second half goes on from the first.
    first = torch.load(with_vae / "context.checkpoint", weights_only=True)["average"]
    moved = (first["context.gate_proj.weight"] - model.context.gate_proj.weight).detach().abs().max()
    assert 0 < float(moved) < 0.01


@pytest.fixture
def plans(monkeypatch):
    """The plans that were to be trained; training takes two minutes each, and stops in the end."""
    seen, clock = [], [0.0]

    def train(make_task, plan):
        seen.append(plan)
        clock[0] += 120
        if plan.name == "joint":
            raise InputError("stopped")
        return {}

    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(stage.time, "monotonic", lambda: clock[0])
    return seen


def test_minutes_are_for_both_halves(with_vae, plans):
    for minutes, left in ((None, None), (5.0, 3.0), (1.0, 0.0)):
        plans.clear()
        with pytest.raises(InputError, match="stopped"):
            stage.run(options(with_vae, minutes=minutes, steps=7, context_steps=3))
        assert [(plan.name, plan.steps, plan.minutes) for plan in plans] == [
            ("context", 3, minutes),
            ("joint", 7, left),
        ]
        assert [plan.decay for plan in plans] == [0.5, 0.4]
        assert len({dataclasses.replace(plan, name="", steps=0, decay=0, minutes=None) for plan in plans}) == 1


def test_write_only_needs_a_checkpoint(with_vae, plans):
    with pytest.raises(InputError, match=r"joint.checkpoint does not exist; first train this stage"):
        stage.run(options(with_vae, write_only=True))
    assert plans == []
    assert not (with_vae / "out").exists()


def test_no_vae_yet(data, plans):
    with pytest.raises(InputError, match=r"first run: python -m examples.mini_moma vae"):
        stage.run(options(data))
    assert plans == []
