"""Times calls on a GPU with a cold L2 cache, and measures the device's peak throughput."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.dispatch import HAS_TRITON

_WARM_UPS = 3


@dataclass(frozen=True)
class Work:
    """Operations and bytes that a result needs: each contributing input is read once, each output written once."""

    operations: int
    bytes: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each sample, and the peak memory that one call needs beyond its inputs."""

    milliseconds: tuple[float, ...]
    extra_mib: float

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))


# Times one call.
Timer = Callable[[Callable[[], object]], Timing]


def gpu_name() -> str | None:
    """Return the name of the current CUDA device; None without a GPU or without Triton."""
    return torch.cuda.get_device_name() if HAS_TRITON and torch.cuda.is_available() else None


class GpuTimer:
    """Times replays of the call's CUDA graph with events, and overwrites the L2 cache before each.

    With a graph no launch waits for Python; the overwriting also gives the graph time to reach the device.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flushed = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        # One stream for warm-up and capture, because libraries allocate a workspace per stream.
        self._stream = torch.cuda.Stream()

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Time a deterministic call that allocates its outputs."""
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
    """Times calls with the host's clock: on a CPU, or for calls that replay CUDA graphs of their own.

    synchronize: waits until the device has finished what a call enqueued.
    """

    def __init__(self, samples: int, synchronize: Callable[[], object] = lambda: None) -> None:
        self._samples = samples
        self._synchronize = synchronize

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Time a call after one warm-up."""
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
    """The device's throughput as measured in this run: of matrix products, and of memory reads plus writes."""

    flops_per_second: float
    bytes_per_second: float

    def floor_ms(self, work: Work) -> float:
        """Return the lower bound in milliseconds of any implementation."""
        return 1e3 * max(work.operations / self.flops_per_second, work.bytes / self.bytes_per_second)

    def described(self) -> dict[str, float]:
        """Return the peaks in TFLOP/s and TB/s."""
        return {
            "tflops": round(self.flops_per_second / 1e12, 1),
            "tb_per_s": round(self.bytes_per_second / 1e12, 3),
        }


def measured_peaks(timer: Timer, dtype: torch.dtype, device: str, *, size: int = 8192, copied: int = 2**30) -> Peaks:
    """Measure the peaks by a matrix product of `size`³ and a copy of `copied` bytes, both of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = timer(lambda: a @ b).median
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source)).median
    return Peaks(1e3 * 2 * size**3 / product, 1e3 * 2 * copied / copy)
