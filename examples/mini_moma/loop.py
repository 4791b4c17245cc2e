"""The training loop of all stages: processes of one thread each that average gradients, checkpoints, curves."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

from examples.mini_moma.muon import Muon
from moma_rt.errors import InputError
from moma_rt.files import atomic_write

_CHECKPOINT_SECONDS = 300
_WARM_UP_STEPS = 30
_CURVE_STEPS = 25
_GRADIENT_NORM = 1.0
# Of the losses that are shown and written, a running mean.
_SMOOTHING = 0.97


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        name: of the stage, and of its files.
        folder: where checkpoint and curve are kept.
        steps: optimizer steps in all.
        rate: learning rate; it falls linearly to zero over the last `decay` (0..1) of the steps.
        average: decay of the weights' exponential moving average (EMA), which is the result.
        seed: of everything random.
        processes: number of processes; each computes its own batch on one thread.
        minutes: time limit, after which training stops and can be resumed; None for no limit.
    """

    name: str
    folder: Path
    steps: int
    rate: float
    decay: float
    average: float = 0.998
    seed: int = 0
    processes: int = 2
    minutes: float | None = None

    @property
    def checkpoint(self) -> Path:
        """The file from which training resumes."""
        return self.folder / f"{self.name}.checkpoint"

    @property
    def curve(self) -> Path:
        """JSON lines: step, seconds of wall and CPU time, losses."""
        return self.folder / f"{self.name}.curve.jsonl"


class Task(Protocol):
    """What is trained."""

    module: nn.Module

    def loss(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a new batch, and named parts of it to show.

        Args:
            rng: draws the batch; PyTorch's own generator is seeded too.
            progress: the share of all steps that is done, 0..1.
        """

    def uses_muon(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is trained with Muon, else AdamW."""


MakeTask = Callable[[], Task]


def train(make_task: MakeTask, plan: Plan) -> dict[str, Tensor]:
    """Train, or go on from the last checkpoint; return the EMA of the weights.

    Interrupted by Ctrl-C or `plan.minutes`, it ends its step and writes a checkpoint first.

    Raises:
        InputError: stopped before the last step, or the checkpoint is of another task.
    """
    # In this process too, whose errors are a line; those of the others are a traceback.
    own = make_task().module.state_dict()
    state = _load(plan) if plan.checkpoint.exists() else None
    if state is not None and _shapes(state["module"]) != _shapes(own):
        raise InputError(
            f"{plan.checkpoint} has other weights than this task, such as those of other tokenizers or another version "
            "of this program; delete it to begin anew"
        )
    plan.folder.mkdir(parents=True, exist_ok=True)
    if state is None or state["step"] < plan.steps:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(_work, (make_task, plan, port), plan.processes)
        state = _load(plan)
    if state["step"] < plan.steps:
        raise InputError(f"{plan.name} stopped at step {state['step']} of {plan.steps}; run it again to go on")
    average: dict[str, Tensor] = state["average"]
    return average


def averaged_weights(plan: Plan) -> dict[str, Tensor]:
    """Return the EMA of the weights at the last checkpoint.

    Raises:
        InputError: there is no checkpoint.
    """
    if not plan.checkpoint.exists():
        raise InputError(f"{plan.checkpoint} does not exist; first train this stage")
    average: dict[str, Tensor] = _load(plan)["average"]
    return average


def _load(plan: Plan) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(plan.checkpoint, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError):
        raise InputError(f"{plan.checkpoint} is no checkpoint; delete it to begin anew") from None
    return state


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


class _Worker:
    def __init__(self, rank: int, task: Task, plan: Plan) -> None:
        self.rank, self.task, self.plan = rank, task, plan
        self.parameters = dict(task.module.named_parameters())
        muon = [p for name, p in self.parameters.items() if task.uses_muon(name, p)]
        others = [p for name, p in self.parameters.items() if not task.uses_muon(name, p)]
        adam = torch.optim.AdamW(others, plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.optimizers: list[torch.optim.Optimizer] = [Muon(muon, plan.rate), adam] if muon else [adam]
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.shown: dict[str, float] = {}
        self.wants_stop = False
        if plan.checkpoint.exists():
            self._resume(_load(plan))

    def stop(self, *_: object) -> None:
        """Let `run` end after its step, in the place of a KeyboardInterrupt in the middle of one."""
        self.wants_stop = True

    def run(self) -> None:
        started, saved, cpu = time.monotonic(), time.monotonic(), time.process_time()
        bar = tqdm(total=self.plan.steps, initial=self.step, desc=self.plan.name, disable=self.rank != 0)
        stops = False
        while self.step < self.plan.steps and not stops:
            before = time.monotonic()
            shown = self._step()
            now = time.monotonic()
            if self.plan.minutes is not None and now - started > self.plan.minutes * 60:
                self.wants_stop = True
            stops, cpu_seconds = self._agreed(time.process_time() - cpu)
            cpu = time.process_time()
            self.seconds, self.cpu_seconds = self.seconds + now - before, self.cpu_seconds + cpu_seconds
            self._show(shown, bar)
            if self.rank == 0 and now - saved > _CHECKPOINT_SECONDS:
                self._save()
                saved = now
        if self.rank == 0:
            self._save()
        bar.close()

    def _step(self) -> dict[str, float]:
        progress = self.step / self.plan.steps
        factor = min(1.0, (self.step + 1) / _WARM_UP_STEPS, (1 - progress) / self.plan.decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate * factor
        # From the step alone, so that a resumed training is the same.
        rng = np.random.default_rng([self.plan.seed, self.rank, self.step])
        torch.manual_seed(int(rng.integers(2**62)))
        loss, shown = self.task.loss(rng, progress)
        self.task.module.zero_grad()
        loss.backward()
        parameters = list(self.parameters.values())
        self._average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM, error_if_nonfinite=True)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        kept = min(self.plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - kept)
        return shown

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.plan.processes
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient.view_as(parameter))

    def _agreed(self, cpu_seconds: float) -> tuple[bool, float]:
        """Return whether any process wants to stop, and the CPU time of all."""
        values = torch.tensor([float(self.wants_stop), cpu_seconds], dtype=torch.float64)
        dist.all_reduce(values)
        return bool(values[0] > 0), float(values[1])

    def _show(self, values: dict[str, float], bar: "tqdm[None]") -> None:
        for name, value in values.items():
            self.shown[name] = self.shown.get(name, value) * _SMOOTHING + value * (1 - _SMOOTHING)
        bar.update(self.step - bar.n)
        if self.rank == 0 and self.step % _CURVE_STEPS == 0:
            bar.set_postfix({name: f"{value:.4f}" for name, value in self.shown.items()})
            point = {"step": self.step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, **self.shown}
            with self.plan.curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: round(value, 5) for name, value in point.items()}) + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "shown": self.shown,
            "module": self.task.module.state_dict(),
            "average": {**self.task.module.state_dict(), **self.average},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_write(self.plan.checkpoint) as temporary:
            torch.save(state, temporary)

    def _resume(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        self.shown = state["shown"]
        self.task.module.load_state_dict(state["module"])
        self.average = {name: state["average"][name] for name in self.parameters}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _work(rank: int, make_task: MakeTask, plan: Plan, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=plan.processes)
    try:
        torch.manual_seed(plan.seed)
        worker = _Worker(rank, make_task(), plan)
        signal.signal(signal.SIGINT, worker.stop)
        worker.run()
    finally:
        dist.destroy_process_group()
