"""Runs a bundle's denoiser and decoder with random inputs on the runtime's classes, for several steps."""

import time
from collections.abc import Callable

from benchmarks.builds.full_size import step_sizes
from benchmarks.gpu.step import StepOptions
from export.sample_inputs import sample_inputs
from moma_rt import backends
from moma_rt.backends.base import Array, Backend
from moma_rt.backends.selection import Choice, Host, choose
from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import MomaError
from moma_rt.memory.buffers import CONDITIONS, STATE, GenerationBuffers
from moma_rt.memory.limits import GRAPH_MEMORY
from moma_rt.memory.networks import Networks, run_once
from moma_rt.messages import one_line
from moma_rt.timing import StageTimer

# The networks that generate pictures from a context embedding.
NETWORKS = ("text_encoder", "context_projector", *GENERATION_NETWORKS)


def first_usable(options: StepOptions) -> tuple[Bundle, Choice]:
    """Return the first of the step's bundles that can generate pictures from an embedding, and its backend choice.

    Raises:
        MomaError: none can; the message is about the last one.
    """
    problem = MomaError("no bundle was given: --bundle DIR")
    for folder in options.bundles:
        try:
            bundle = Bundle.open(folder)
            for name in NETWORKS:
                bundle.network(name)
            return bundle, choose(options.backend, bundle.manifest, Host())
        except MomaError as error:
            problem = error
    raise problem


class Generation:
    """The steps and decoding of one picture: batch 1, 40 % of the reference tokens inside the mask."""

    def __init__(self, bundle: Bundle, choice: Choice) -> None:
        self.bundle = bundle
        self.backend: Backend = backends.create(choice.backend)
        networks = Networks(bundle, self.backend, choice.engines)
        start = time.perf_counter()
        self.denoiser, self.decoder = networks.get_all(GENERATION_NETWORKS, StageTimer())
        self.load_seconds = round(time.perf_counter() - start, 2)

    def inputs(self, halves: int) -> dict[str, Array]:
        """Return random denoiser inputs, as in the middle of a generation, by name."""
        geometry = self.bundle.manifest.geometry
        sizes = {**step_sizes(geometry), "guided_batch": halves}
        return sample_inputs(self.denoiser.spec, geometry, sizes)

    def outputs(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Return the outputs of one step."""
        return run_once(self.backend, self.denoiser, inputs)

    def buffers(self, halves: int, rows: Array) -> GenerationBuffers:
        """Return filled buffers whose steps follow the schedule `rows`, float32 [steps,64]."""
        sizes = step_sizes(self.bundle.manifest.geometry)
        made = GenerationBuffers(self.backend, self.denoiser, self.decoder, sizes, (halves,), GRAPH_MEMORY)
        inputs = self.inputs(halves)
        made.set_schedule(rows, None)
        for name, array in inputs.items():
            if name in CONDITIONS:
                made.set_condition(name, array[:, None])
            elif name not in (*STATE, "schedule_row", "noise"):
                made.set_input(name, array)
        made.start(inputs["latents"])
        return made

    def why_not_captured(self, enqueue: Callable[[], None]) -> str:
        """Try again to capture work that the backend did not capture; returns PyTorch's error, or why there is none."""
        # The runtime then runs the work without a graph, and does not report the reason.
        stream = getattr(getattr(self.backend, "_queue", None), "stream", None)
        if stream is None:
            return "" if not self.backend.supports_capture else f"{self.backend.name} does not say"
        import torch

        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                enqueue()
        except (RuntimeError, MomaError) as error:
            return one_line(error.__context__ or error)
        return "it was captured at the second attempt"

    def milliseconds(self, run: Callable[[], None], samples: int, at_once: int = 1) -> list[float]:
        """Time `samples` runs after a warm-up, by the host's clock, until the device is done.

        at_once: the number of runs enqueued without waiting in between; a sample is their mean.
        """
        taken = []
        for _ in range(1 + samples):
            self.backend.synchronize()
            start = time.perf_counter()
            for _ in range(at_once):
                run()
            self.backend.synchronize()
            taken.append(1000 * (time.perf_counter() - start) / at_once)
        return taken[1:]
