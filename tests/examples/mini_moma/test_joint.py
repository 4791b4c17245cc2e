"""The loss of everything together, and the semantics that it trains under."""

import dataclasses

import numpy as np
import pytest
import torch

from examples.mini_moma import joint
from examples.mini_moma.context import ContextTask
from examples.mini_moma.joint import JointTask, Recipe, threshold

# Nothing reads what follows the vision tower's last layer but one.
UNUSED = ("vision.encoder.layers.2.", "vision.post_layernorm.")


def unused(name):
    return any(part in name for part in UNUSED)


@pytest.fixture(scope="module")
def context(drawn_data):
    torch.manual_seed(1)
    return ContextTask(drawn_data).module.state_dict()


@pytest.fixture(scope="module")
def task(drawn_data, context):
    torch.manual_seed(0)
    return JointTask(drawn_data, context, Recipe())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Eight pictures in a batch."""
    monkeypatch.setattr(joint, "_PHOTOS", 2)


@pytest.fixture
def calls(task):
    """Noised latents, timesteps, text and state of every pass on pictures; the last one is that of the loss."""
    seen = []
    hook = task.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    yield seen
    hook.remove()


def loss(task, **recipe):
    task.recipe = dataclasses.replace(Recipe(), **recipe)
    torch.manual_seed(0)
    return task.loss(np.random.default_rng(0), 0.0)


def test_it_goes_on_from_the_context_encoder(task, context):
    state = task.module.state_dict()
    assert torch.equal(state["model.context.gate_proj.weight"], context["context.gate_proj.weight"])
    assert torch.equal(state["reader.read.bias"], context["reader.read.bias"])


def test_every_parameter_that_is_used_gets_a_gradient(task):
    task.module.zero_grad()
    value, shown = loss(task)
    value.backward()
    assert list(shown) == ["loss", "inside", "outside", "mask", "r2"]
    assert shown["loss"] == pytest.approx(value.item())
    without = {name for name, parameter in task.module.named_parameters() if parameter.grad is None}
    assert without
    assert without == {name for name, _ in task.module.named_parameters() if unused(name)}


def test_muon_trains_matrices_of_the_unet_and_its_adapters(task):
    chosen = {name for name, parameter in task.module.named_parameters() if task.uses_muon(name, parameter)}
    assert all(name.startswith("model.unet.") for name in chosen)
    assert "model.unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_ip.weight" in chosen
    assert "model.unet.conv_in.weight" in chosen
    assert not any(name.endswith(".bias") or "time_emb" in name for name in chosen)


@torch.no_grad()
def test_early_steps_have_neither_reference_nor_mask(task, calls, monkeypatch):
    drawn = torch.tensor([0, 949, 950, 999] * 2)
    # A timestep is drawn as a part of the schedule and a place in it; those are the first numbers that are drawn.
    places, rand = [torch.full((8,), 0.004)], torch.rand
    monkeypatch.setattr(joint.torch, "randperm", lambda count: drawn * count / 1000)
    monkeypatch.setattr(joint.torch, "rand", lambda *shape: places.pop() if places else rand(*shape))
    loss(task, without_reference=0.0, own_foreground=1.0)
    assert len(calls) == 2
    for _, t_b, _, state in calls:
        assert torch.equal(state.strength_b > 0, t_b < 950)
        assert bool((state.strength_b <= 1.2).all())
    _, t_b, _, state = calls[-1]
    assert torch.equal(t_b, drawn)
    whole = (state.foreground_bs == 1).all(1)
    assert torch.equal(whole, drawn >= 950)


@torch.no_grad()
def test_its_own_mask_comes_from_an_earlier_step(task, calls):
    loss(task, own_foreground=1.0)
    (_, earlier, _, first), (_, t_b, _, second) = calls
    assert bool(((earlier > t_b) & (earlier <= t_b + 100) | (earlier == 999)).all())
    own = threshold(joint.min_max(torch.stack(first.saliency).mean(0)))
    assert torch.equal(second.foreground_bs[t_b < 950], own[t_b < 950])
    calls.clear()
    loss(task, own_foreground=0.0)
    assert len(calls) == 1


@torch.no_grad()
def test_without_condition_text_is_empty_and_the_embedding_zero(task, calls):
    loss(task, unconditional=1.0)
    _, _, text, state = calls[-1]
    ids = task.tokens.text("")[None]
    torch.testing.assert_close(text, task.model.encode_text(ids).expand_as(text))
    torch.testing.assert_close(state.context_bmc[:1], task.model.context_tokens(torch.zeros(1, 1024)))
    # The unconditional half looks at the same positions.
    assert bool((state.subject_bt.sum(1) > 0).all())


@torch.no_grad()
def test_without_reference_only_the_context_shows_the_subject(task, calls):
    loss(task, without_reference=1.0)
    assert all(not state.strength_b.any() for _, _, _, state in calls)


def test_noise_is_stable_diffusions(task):
    alphas = task.alphas
    assert float(alphas[0]) == pytest.approx(0.99915, abs=1e-6)
    assert float(alphas[-1]) == pytest.approx(0.0046601, abs=1e-6)


def test_photos_are_noised_at_zero(task, monkeypatch):
    given = []
    monkeypatch.setattr(task.model, "read_photos", lambda latents, ids: given.append((latents, ids)))
    batch = task.samples.batch([(0, 0), (0, 2)])
    task._conditions(batch, torch.zeros(8, 1024))
    ((latents, ids),) = given
    assert torch.equal(ids, batch.names_pt)
    noise = (latents - 0.99915**0.5 * batch.photos_pchw) / 0.00085**0.5
    assert 0.8 < float(noise.std()) < 1.2


def test_threshold_keeps_soft_values():
    assert threshold(torch.tensor([0.1, 0.2, 0.25, 1.0])).tolist() == [0, 0, 0.25, 1]
