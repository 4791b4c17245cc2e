import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from torch import nn

from examples.mini_moma import loop
from examples.mini_moma.loop import Plan, averaged_weights, train
from moma_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("one_process")


class Regression:
    """A small linear regression; `at_step` is called before each loss with the number of losses so far."""

    def __init__(self, at_step=lambda step: None, width=16, with_muon=True):
        self.module = nn.Sequential(nn.Linear(width, 16), nn.Linear(16, 4))
        self.at_step, self.with_muon, self.losses = at_step, with_muon, 0

    def uses_muon(self, name, parameter):
        return self.with_muon and name == "0.weight"

    def loss(self, rng, progress):
        self.at_step(self.losses)
        self.losses += 1
        inputs = torch.from_numpy(rng.standard_normal((8, self.module[0].in_features))).float()
        # Of PyTorch's generator too, which the loop seeds.
        error = (self.module(inputs + 0.01 * torch.randn_like(inputs)) - inputs[:, :4]).square().mean()
        return error, {"mse": error.item()}


@pytest.fixture
def plan(tmp_path):
    return Plan("test", tmp_path, steps=6, rate=0.01, decay=0.5, processes=1)


def stored(plan):
    return torch.load(plan.checkpoint, weights_only=True)


def test_a_resumed_training_is_the_uninterrupted_one(plan, tmp_path):
    whole = train(Regression, dataclasses.replace(plan, folder=tmp_path / "whole"))
    brief = dataclasses.replace(plan, minutes=0)
    for step in range(1, 6):
        with pytest.raises(InputError, match=f"test stopped at step {step} of 6; run it again to go on"):
            train(Regression, brief)
    resumed = train(Regression, brief)
    assert whole.keys() == resumed.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for key in ("module", "average"):
        first, second = (stored(dataclasses.replace(plan, folder=f))[key] for f in (tmp_path / "whole", tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(stored(plan)["module"]["0.weight"], whole["0.weight"])


def test_another_seed_is_another_training(plan, tmp_path):
    first = train(Regression, plan)
    second = train(Regression, dataclasses.replace(plan, folder=tmp_path / "other", seed=1))
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_it_learns(plan):
    train(Regression, dataclasses.replace(plan, steps=200, rate=0.03))
    points = [json.loads(line) for line in plan.curve.read_text().splitlines()]
    assert points[-1]["mse"] < 0.3 * points[0]["mse"]


def test_a_trained_stage_is_not_trained_again(plan):
    first = train(Regression, plan)
    written = plan.checkpoint.stat().st_mtime_ns
    again = train(Regression, dataclasses.replace(plan, steps=3))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert torch.equal(first["0.weight"], averaged_weights(plan)["0.weight"])
    assert plan.checkpoint.stat().st_mtime_ns == written


def test_ctrl_c_ends_the_step_first(plan, tmp_path):
    def interrupt(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InputError, match="stopped at step 3 of 6"):
        train(lambda: Regression(interrupt), plan)
    resumed = train(Regression, plan)
    whole = train(Regression, dataclasses.replace(plan, folder=tmp_path / "whole"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_checkpoint(plan, value):
    with pytest.raises(InputError, match="stopped at step 1"):
        train(Regression, dataclasses.replace(plan, minutes=0))
    before = plan.checkpoint.read_bytes()

    def task():
        task = Regression()
        loss = task.loss
        task.loss = lambda rng, progress: (loss(rng, progress)[0] * value, {})
        return task

    with pytest.raises(RuntimeError, match="non-finite"):
        train(task, plan)
    assert plan.checkpoint.read_bytes() == before
    assert train(Regression, plan)


def test_the_curve_has_a_line_every_25_steps(plan):
    train(Regression, dataclasses.replace(plan, steps=55))
    points = [json.loads(line) for line in plan.curve.read_text(encoding="utf-8").splitlines()]
    assert [point["step"] for point in points] == [25, 50]
    assert list(points[0]) == ["step", "seconds", "cpu_seconds", "mse"]
    assert 0 < points[0]["seconds"] < points[1]["seconds"]


def test_the_rate_rises_and_falls(plan, monkeypatch):
    monkeypatch.setattr(loop, "_WARM_UP_STEPS", 2)
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    train(Regression, plan)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_all_with_adam(plan):
    assert train(lambda: Regression(with_muon=False), plan)


def test_a_checkpoint_of_another_task(plan):
    train(Regression, plan)
    with pytest.raises(InputError, match=r"test.checkpoint has other weights than this task.*delete it to begin anew"):
        train(lambda: Regression(width=20), plan)


def test_a_file_that_is_no_checkpoint(plan):
    plan.checkpoint.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"test.checkpoint is no checkpoint; delete it"):
        train(Regression, plan)


def test_no_checkpoint_yet(plan):
    with pytest.raises(InputError, match=r"test.checkpoint does not exist; first train this stage"):
        averaged_weights(plan)


def test_a_users_mistake_leaves_no_folder(plan, tmp_path):
    def broken():
        raise InputError("no data")

    with pytest.raises(InputError, match="no data"):
        train(broken, dataclasses.replace(plan, folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_gradients_are_averaged(plan, monkeypatch):
    """As if a second process had the same gradients: their sum, halved."""
    alone = train(Regression, plan)
    monkeypatch.setattr(loop.dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(loop.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(loop.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(loop.mp, "spawn", lambda work, arguments, processes: work(0, *arguments))
    other = dataclasses.replace(plan, processes=2, folder=plan.folder / "two")
    both = train(Regression, other)
    assert np.allclose(alone["0.weight"], both["0.weight"], atol=1e-6)
