"""Time on a GPU: of a call, with nothing of it in the L2 cache, and the device's own limits."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.dispatch import HAS_TRITON

_WARM_UPS = 3


@dataclass(frozen=True)
class Work:
    """Operations that a result needs, and bytes: every input that takes part read once, every output written once."""

    operations: int
    bytes: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each sample, and the memory that one call takes beyond its inputs."""

    milliseconds: tuple[float, ...]
    extra_mib: float

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))


# Measures one call.
Timer = Callable[[Callable[[], object]], Timing]


def gpu_name() -> str | None:
    """What the current CUDA device is called; None where there is none, or no Triton to make kernels for it."""
    return torch.cuda.get_device_name() if HAS_TRITON and torch.cuda.is_available() else None


class GpuTimer:
    """Events around replays of a CUDA graph of the call, with a buffer larger than the L2 cache written before each.

    A graph, so that no launch waits for Python; the writing before it also gives the graph time to reach the device.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flushed = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        # To warm up and to capture on: libraries keep a workspace for every stream that they see.
        self._stream = torch.cuda.Stream()

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Time a call that allocates its outputs, uses no random numbers, and does the same each time."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                call()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            extra_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_WARM_UPS + self._samples)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return Timing(tuple(start.elapsed_time(end) for start, end in events[_WARM_UPS:]), round(extra_mib, 1))


class HostTimer:
    """The host's clock around calls: on a CPU, or of what cannot be captured in a graph once more.

    synchronize: returns when the device has done what a call enqueued.
    """

    def __init__(self, samples: int, synchronize: Callable[[], object] = lambda: None) -> None:
        self._samples = samples
        self._synchronize = synchronize

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Time a call."""
        call()
        self._synchronize()
        taken = []
        for _ in range(self._samples):
            start = time.perf_counter()
            call()
            self._synchronize()
            taken.append(1000 * (time.perf_counter() - start))
        return Timing(tuple(taken), 0.0)


@dataclass(frozen=True)
class Peaks:
    """What this device did at best in this run, at the median: matrix products, and bytes read and written."""

    flops_per_second: float
    bytes_per_second: float

    def floor_ms(self, work: Work) -> float:
        """The milliseconds that no implementation is under."""
        return 1e3 * max(work.operations / self.flops_per_second, work.bytes / self.bytes_per_second)

    def described(self) -> dict[str, float]:
        """In TFLOP/s and TB/s."""
        return {
            "tflops": round(self.flops_per_second / 1e12, 1),
            "tb_per_s": round(self.bytes_per_second / 1e12, 3),
        }


def measured_peaks(timer: Timer, dtype: torch.dtype, device: str, *, size: int = 8192, copied: int = 2**30) -> Peaks:
    """By a matrix product of `size`³ on random numbers and a copy of `copied` bytes."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = timer(lambda: a @ b).median
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source)).median
    return Peaks(1e3 * 2 * size**3 / product, 1e3 * 2 * copied / copy)
