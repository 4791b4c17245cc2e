"""Generation buffers: allocated and bound once per size, reused by every generation of that size."""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from moma_rt.backends.base import Array, Backend, Bound, Buffer, CapturedGraph, Network, Size, nbytes
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import OutOfMemory
from moma_rt.memory.lru import Lru

# Carried from step to step: the denoiser reads <name> and writes next_<name>.
STATE = ("latents", "history", "foreground_mask")
# Inputs that differ between the guidance halves; their batch dimension is halves * batch.
CONDITIONS = ("text_tokens", "context_tokens")
# What the VAE decoder writes.
PICTURES = ("image", "pixel_mean")
# Inputs that differ between steps lie in tables with a row per step. These are the fewest rows a table is made with.
_MIN_TABLE_ROWS = MappingProxyType({"schedule_row": 64, "noise": 1})
# One per number of steps and guidance; a graph of 50 steps holds some ten thousand launches.
_MAX_GRAPHS = 4


class GenerationBuffers:
    """Owns all buffers of the denoiser and the VAE decoder for one batch size, guidance and reference size.

    The state is double-buffered: even steps read the first set and write the second, odd steps the reverse, and each
    direction is bound once. Inputs that differ between steps lie in tables on the device, so a generation uploads
    everything before its first step and can be captured as one CUDA graph. Steps with and without guidance have
    conditions of their own and share all other buffers.

    Args:
        sizes: of the denoiser's dynamic dimensions, except guided_batch, which is halves * batch.
        halves: numbers of guidance halves that steps will have: 2 with guidance, 1 without.
        graph_budget: bytes that captured graphs may take; the one used last is kept even if it is larger.
    """

    def __init__(
        self,
        backend: Backend,
        denoiser: Network,
        decoder: Network,
        sizes: Mapping[str, int],
        halves: Collection[int],
        graph_budget: int,
    ) -> None:
        spec, batch = denoiser.spec, sizes["batch"]
        shared = [t.name for t in spec.inputs if t.name not in (*STATE, *CONDITIONS)]
        groups: dict[Hashable, dict[str, Size]] = {
            "inputs": _sizes(spec, sizes, shared),
            "even": _sizes(spec, sizes, STATE),
            "odd": _sizes(spec, sizes, STATE),
            "pictures": _sizes(decoder.spec, sizes, PICTURES),
        }
        for count in halves:
            groups[count] = _sizes(spec, {**sizes, "guided_batch": count * batch}, CONDITIONS)
        buffers = backend.allocate({(key, name): size for key, group in groups.items() for name, size in group.items()})

        def buffers_of(key: Hashable) -> dict[str, Buffer]:
            return {name: buffers[key, name] for name in groups[key]}

        self._backend = backend
        self._can_capture = backend.supports_capture
        self._spec = spec
        self._buffer_bytes = sum(map(nbytes, buffers.values()))
        self._inputs = buffers_of("inputs")
        self._conditions = {count: buffers_of(count) for count in halves}
        self._states = (buffers_of("even"), buffers_of("odd"))
        self._pictures = buffers_of("pictures")
        self._steps = {count: tuple(self._bind_step(denoiser, count, i) for i in range(2)) for count in halves}
        self._decoders = tuple(decoder.bind({"latents": state["latents"], **self._pictures}) for state in self._states)
        self._tables: dict[str, Buffer] = {}
        self._tables_in_use: tuple[str, ...] = ()
        self._graphs: Lru[tuple[int, ...], CapturedGraph | None] = Lru(_MAX_GRAPHS, _graph_size, graph_budget)
        self._current = 0
        self._subject_ids = [""] * batch

    @property
    def size(self) -> int:
        """Bytes of all buffers and captured graphs."""
        return self._buffer_bytes + sum(map(nbytes, self._tables.values())) + self._graphs.size

    def _bind_step(self, denoiser: Network, halves: int, parity: int) -> Bound:
        following = {f"next_{name}": buffer for name, buffer in self._states[1 - parity].items()}
        return denoiser.bind({**self._inputs, **self._conditions[halves], **self._states[parity], **following})

    def set_schedule(self, rows: Array, noise: Array | None) -> None:
        """Upload the tables: rows float32 [steps,64], and noise to add float32 [steps,B,4,h,w] or None."""
        self._upload_table("schedule_row", rows)
        if noise is not None:
            self._upload_table("noise", noise)
        elif "noise" in self._tables_in_use:
            self._fill(self._inputs["noise"], 0.0)
        self._tables_in_use = ("schedule_row",) if noise is None else tuple(_MIN_TABLE_ROWS)

    def start(self, latents_bchw: Array) -> None:
        """Reset the state to these latents, float32 [B,4,h,w], a history of zeros and a foreground mask of ones."""
        self._current = 0
        state = self._states[0]
        self._backend.upload(state["latents"], latents_bchw)
        self._fill(state["history"], 0.0)
        self._fill(state["foreground_mask"], 1.0)

    def load_subject(self, sample: int, identity: str, inputs: Callable[[], Mapping[str, Buffer]]) -> None:
        """Copy a subject's inputs, each of one sample's shape, into a sample's rows unless they are there already.

        A subject may have fewer reference tokens than the buffers: the rest is zeroed, in the object mask as well.
        """
        if identity == self._subject_ids[sample]:
            return
        self._subject_ids[sample] = ""
        for name, source in inputs().items():
            self._backend.fill_row(self._inputs[name], sample, source)
        self._subject_ids[sample] = identity

    def set_input(self, name: str, array: Array) -> None:
        """Upload a denoiser input that is neither state nor condition."""
        self._backend.upload(self._inputs[name], array)

    def set_condition(self, name: str, array_gb: Array) -> None:
        """Upload one of `CONDITIONS`, [G,B,...] with the unconditional half first.

        Steps without guidance read the conditional half.
        """
        for halves, buffers in self._conditions.items():
            used = array_gb[-halves:]
            self._backend.upload(buffers[name], used.reshape(-1, *used.shape[2:]))

    def step(self, index: int, halves: int) -> None:
        """Enqueue a step of so many guidance halves, and make its outputs the state of the next step."""
        for name in self._tables_in_use:
            self._backend.copy_row(self._tables[name], index, self._inputs[name])
        self._steps[halves][self._current].enqueue()
        self._current = 1 - self._current

    def limit_run_ahead(self) -> None:
        """Wait until the host is at most one step ahead of the device."""
        self._backend.limit_run_ahead()

    def decode(self) -> None:
        """Enqueue the decoding of the current latents."""
        self._decoders[self._current].enqueue()

    def graph(self, halves: Sequence[int]) -> CapturedGraph | None:
        """Return the captured graph of all steps, with these halves, and the decoding; None if it cannot be captured.

        A graph that is not cached is captured now. That overwrites the state, so call `start` afterwards.

        Raises:
            OutOfMemory: too little device memory, even with all other graphs evicted.
        """
        if not self._can_capture:
            return None
        key = (len(self._tables_in_use), *halves)
        with contextlib.suppress(OutOfMemory):
            graph = self._graphs.get_or_make(key, lambda: self._capture(halves))
            if graph is None or graph.is_valid:
                return graph
        # The graph refers to memory that has moved since, or the other graphs leave too little memory.
        self._graphs.clear()
        return self._graphs.get_or_make(key, lambda: self._capture(halves))

    def disable_capture(self) -> None:
        """Stop capturing after a failure: each attempt costs time and evicts the other caches."""
        self._can_capture = False

    def replay(self, graph: CapturedGraph, steps: int) -> None:
        """Enqueue a captured generation of so many steps."""
        graph.replay()
        self._current = steps % 2

    def _capture(self, halves: Sequence[int]) -> CapturedGraph | None:
        # Warm up: libraries load and select kernels on the first run, which cannot be captured. Run everything twice,
        # since the workspace may grow, and so move, until each network has run.
        steps = [step for count in dict.fromkeys(halves) for step in self._steps[count]]
        for bound in (*steps, *self._decoders) * 2:
            bound.enqueue()
        self._backend.synchronize()
        self._current = 0

        def enqueue() -> None:
            for index, count in enumerate(halves):
                self.step(index, count)
            self.decode()

        return self._backend.capture(enqueue)

    def read_state(self, name: str) -> Array:
        """Download one of `STATE`, after all enqueued work."""
        return self._backend.download(self._states[self._current][name])

    def read_pictures(self) -> tuple[Array, Array]:
        """Download the pictures decoded last, uint8 [B,H,W,3], and the mean of each before clipping, float32 [B].

        A mean is NaN or infinity if any of the decoder's values was.
        """
        image, mean = (self._backend.download(self._pictures[name]) for name in PICTURES)
        return image, mean

    def _upload_table(self, name: str, rows: Array) -> None:
        """Upload a table in place, since graphs refer to its address; reallocate it if it is too short."""
        table = self._tables.get(name)
        if table is None or table.shape[0] < len(rows):
            self._graphs.clear()
            shape = (max(len(rows), _MIN_TABLE_ROWS[name]), *self._inputs[name].shape)
            table = self._backend.allocate({name: (shape, self._spec.tensor(name).dtype)})[name]
            self._tables[name] = table
        padded = np.zeros(table.shape, rows.dtype)
        padded[: len(rows)] = rows
        self._backend.upload(table, padded)

    def _fill(self, buffer: Buffer, value: float) -> None:
        self._backend.upload(buffer, np.broadcast_to(np.float32(value), buffer.shape))


def _sizes(spec: NetworkSpec, sizes: Mapping[str, int], names: Iterable[str]) -> dict[str, Size]:
    tensors = [spec.tensor(name) for name in names]
    return {t.name: (t.resolve(**sizes), t.dtype) for t in tensors}


def _graph_size(graph: CapturedGraph | None) -> int:
    return 0 if graph is None else graph.size
