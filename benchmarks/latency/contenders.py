"""The contenders of the latency benchmark: the runtime and the baselines, each in its own process.

So memory peaks are measured separately, and the runtime's process never imports PyTorch, as in production.
"""

import os
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from benchmarks.latency.replays import TimedReplays
from benchmarks.latency.requests import ORIGINALS, RUNTIME, Answer, Request, Settings
from benchmarks.memory import device_mib_used, peak_gb
from moma_rt import backends
from moma_rt.backends.selection import Host, choose
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import MomaError
from moma_rt.memory.lru import Lru
from moma_rt.subject import Subject
from moma_rt.timing import LOADING

# Sent in place of a request, to ask for the memory peak.
_TELL_PEAK = "peak"
# How each baseline runs the UNet of its steps, as `benchmarks.latency.original` names it.
EXECUTIONS: Mapping[str, str] = MappingProxyType(
    {
        "eager": "eager",
        "compiled": "compiled",
        "plain": "eager",
        "plain_compiled": "compiled",
        "plain_graph": "graph",
    }
)
BASELINES = tuple(EXECUTIONS)


class Contender(Protocol):
    """Answers requests, one at a time."""

    def answer(self, request: Request) -> Answer: ...


class Deployed:
    """The runtime, with a cache of the last two subjects."""

    def __init__(self, settings: Settings) -> None:
        from moma_rt.runtime import Runtime

        self._settings = settings
        bundle = Bundle.open(settings.bundle)
        choice = choose(settings.backend, bundle.manifest, Host())
        backend: Any = TimedReplays(backends.create(choice.backend, settings.threads))
        self._replays = backend.seconds
        self._runtime = Runtime(bundle, backend, choice.engines)
        self._enrolled: Lru[tuple[str, int], Any] = Lru(2)

    def answer(self, request: Request) -> Answer:
        """Generate a picture; the time includes enrollment if the subject is new."""
        settings, start, seconds = self._settings, time.perf_counter(), dict[str, float]()

        def enroll() -> Any:
            if settings.subject is not None:
                return Subject.load(settings.subject)
            made = self._runtime.enroll(request.photo, request.mask, request.name, seed=request.subject_seed)
            seconds.update(made.seconds)
            return made

        self._replays.clear()
        subject = self._enrolled.get_or_make((request.name, request.subject_seed), enroll)
        result = self._runtime.generate(
            subject,
            request.prompt,
            strength=settings.strength,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=request.seed,
            scheduler=settings.scheduler,
            context_embedding=settings.embedding,
            on_step=(lambda info: None) if request.is_watched else None,
        )
        for stage, value in result.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        total = time.perf_counter() - start
        seconds.pop(LOADING, None)
        replay = sum(self._replays) if self._replays else None
        return Answer(total, seconds, np.asarray(result.images[0]), result.foreground_masks[0], replay)


def baseline(name: str, settings: Settings) -> Contender:
    """Return one of `BASELINES`, with the weights that the bundle was built from."""
    import torch

    from benchmarks.latency.original import Original, PlainDiffusion
    from export.compare import same_checkpoint

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    bundle = Bundle.open(settings.bundle)
    checkpoint = same_checkpoint(settings.weights, bundle, tuple(bundle.manifest.networks))
    kind = Original if name in ORIGINALS else PlainDiffusion
    return kind(checkpoint, settings, EXECUTIONS[name])


CONTENDERS: Mapping[str, Callable[[Settings], Contender]] = MappingProxyType(
    {RUNTIME: Deployed} | {name: partial(baseline, name) for name in BASELINES}
)


class ContenderProcess:
    """Runs a contender in a daemon process.

    Raises:
        MomaError: by every method, if the contender failed or its process was killed.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._device_mib_before = device_mib_used()
        context = get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=serve, args=(name, settings, far), daemon=True)
        self._process.start()
        # Closed here, so that the pipe reports EOF if the process dies.
        far.close()
        self._receive()

    def answer(self, request: Request) -> Answer:
        """Send a request and return the answer."""
        self._pipe.send(request)
        answer: Answer = self._receive()
        return answer

    def device_gb(self) -> float | None:
        """Return the device memory in GB in use since just before the process started; None without an NVIDIA GPU.

        Only right if no other process allocates meanwhile. Includes what PyTorch and the driver reserve.
        """
        before, used = self._device_mib_before, device_mib_used()
        return None if before is None or used is None else (used - before) * 2**20 / 1e9

    def peak_gb(self) -> float:
        """Return the peak of its resident memory so far, in GB."""
        self._pipe.send(_TELL_PEAK)
        peak: float = self._receive()
        return peak

    def end(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise MomaError(f"{self.name}: its process was killed; it may have run out of memory") from None
        if not ok:
            raise MomaError(f"{self.name}: {value}")
        return value


def serve(name: str, settings: Settings, pipe: Connection) -> None:
    """Run a contender's process: report that it is ready, then answer requests and memory queries until None comes."""
    # By default PyTorch's OpenMP threads spin while they wait: that takes cores from the other contenders, and makes a
    # baseline several times slower on a busy machine. ONNX Runtime's threads do not spin between requests either.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        contender = CONTENDERS[name](settings)
        pipe.send((True, None))
        while (request := pipe.recv()) is not None:
            pipe.send((True, peak_gb() if request == _TELL_PEAK else contender.answer(request)))
    except MomaError as error:
        pipe.send((False, str(error)))
    except (EOFError, BrokenPipeError):
        return  # the parent process has ended
    except Exception as error:
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {error}"))
