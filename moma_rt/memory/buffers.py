"""The memory in which pictures are made: allocated and bound once, used by every generation of its size."""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from moma_rt.backends.base import Array, Backend, Bound, Buffer, CapturedGraph, Network, Size, nbytes
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import OutOfMemory
from moma_rt.memory.lru import Lru

# What a step reads of itself and hands to the next one; the denoiser's outputs are named next_<name>.
STATE = ("latents", "history", "foreground_mask")
# What the halves of guidance differ in: their batch is that of the halves together.
CONDITIONS = ("text_tokens", "context_tokens")
# What differs from step to step: a row of a table each. Tables have room for so many steps at least.
_TABLE_ROWS = MappingProxyType({"schedule_row": 64, "noise": 1})
# Generations of other lengths or guidance; a recording of 50 steps holds some ten thousand launches.
_MAX_GRAPHS = 4


class GenerationBuffers:
    """Owns every buffer of the denoiser and the VAE decoder for one batch size, choice of guidance and reference size.

    The state lies in two sets of buffers. Even steps read the first and write the second, odd steps the other
    way round; each direction is bound once. What differs between the steps lies in tables beside them, so a generation
    uploads before its first step and not again, and the whole of it can be recorded. A step computes as many halves of
    guidance as it has conditions for: each number of `halves` has its own conditions, and shares the rest.

    sizes: of the denoiser's dynamic dimensions but guided_batch, which is halves times batch.
    halves: the numbers of halves that steps will have, 2 with guidance and 1 without.
    graph_budget: bytes that recordings may take together; the one used last is kept whatever it takes.
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
            "images": _sizes(decoder.spec, sizes, ("image",)),
        }
        for count in halves:
            groups[count] = _sizes(spec, {**sizes, "guided_batch": count * batch}, CONDITIONS)
        found = backend.allocate({(key, name): size for key, group in groups.items() for name, size in group.items()})

        def of(key: Hashable) -> dict[str, Buffer]:
            return {name: found[key, name] for name in groups[key]}

        self._backend = backend
        self._captures = backend.supports_capture
        self._spec = spec
        self._buffer_bytes = sum(map(nbytes, found.values()))
        self._inputs = of("inputs")
        self._conditions = {count: of(count) for count in halves}
        self._states = (of("even"), of("odd"))
        self._images = of("images")
        self._steps = {count: tuple(self._bind_step(denoiser, count, i) for i in range(2)) for count in halves}
        self._decoders = tuple(
            decoder.bind({"latents": state["latents"], "image": self._images["image"]}) for state in self._states
        )
        self._tables: dict[str, Buffer] = {}
        self._read: tuple[str, ...] = ()
        self._graphs: Lru[tuple[int, ...], CapturedGraph | None] = Lru(_MAX_GRAPHS, _graph_size, graph_budget)
        self._current = 0
        self._owners = [""] * batch

    @property
    def size(self) -> int:
        """Bytes of memory that it takes, with all that was recorded on it."""
        return self._buffer_bytes + sum(map(nbytes, self._tables.values())) + self._graphs.size

    def _bind_step(self, denoiser: Network, halves: int, parity: int) -> Bound:
        following = {f"next_{name}": buffer for name, buffer in self._states[1 - parity].items()}
        return denoiser.bind({**self._inputs, **self._conditions[halves], **self._states[parity], **following})

    def set_schedule(self, rows: Array, noise: Array | None) -> None:
        """What each step reads: rows float32 [steps,64], and fresh noise float32 [steps,B,4,h,w] or None."""
        self._upload_table("schedule_row", rows)
        if noise is not None:
            self._upload_table("noise", noise)
        elif "noise" in self._read:
            self._fill(self._inputs["noise"], 0.0)
        self._read = ("schedule_row",) if noise is None else tuple(_TABLE_ROWS)

    def start(self, latents_bchw: Array) -> None:
        """Start over from these latents, float32 [B,4,h,w], with no history and a foreground of ones."""
        self._current = 0
        state = self._states[0]
        self._backend.upload(state["latents"], latents_bchw)
        self._fill(state["history"], 0.0)
        self._fill(state["foreground_mask"], 1.0)

    def load_subject(self, sample: int, owner: str, inputs: Callable[[], Mapping[str, Buffer]]) -> None:
        """Copy one sample's inputs, of a sample's shape, to their place, unless they are there from the same owner.

        Reference tokens may be fewer than there is room for: zeros follow, in the object mask as well.
        """
        if owner == self._owners[sample]:
            return
        self._owners[sample] = ""
        for name, source in inputs().items():
            self._backend.fill_row(self._inputs[name], sample, source)
        self._owners[sample] = owner

    def set_input(self, name: str, array: Array) -> None:
        """Copy an array into a denoiser input that is neither state nor condition."""
        self._backend.upload(self._inputs[name], array)

    def set_condition(self, name: str, array_gb: Array) -> None:
        """Copy one of `CONDITIONS`, [G,B,...] with the unconditional half first.

        Steps of one half take the conditional one.
        """
        for halves, buffers in self._conditions.items():
            chosen = array_gb[-halves:]
            self._backend.upload(buffers[name], chosen.reshape(-1, *chosen.shape[2:]))

    def step(self, index: int, halves: int) -> None:
        """Enqueue a step, with or without guidance, and make its outputs the state of the next."""
        for name in self._read:
            self._backend.copy_row(self._tables[name], index, self._inputs[name])
        self._steps[halves][self._current].enqueue()
        self._current = 1 - self._current

    def limit_run_ahead(self) -> None:
        """Wait for the device as far as to be no more than one step ahead of it."""
        self._backend.limit_run_ahead()

    def decode(self) -> None:
        """Enqueue the decoding of the current latents."""
        self._decoders[self._current].enqueue()

    def graph(self, halves: Sequence[int]) -> CapturedGraph | None:
        """The whole generation, of steps with these halves and the decoding, to be replayed; None where it cannot be.

        It is recorded if it was not, and what was begun before is lost then: `start` comes after this.

        Raises:
            OutOfMemory: there is no room for it, even without the others.
        """
        if not self._captures:
            return None
        key = (len(self._read), *halves)
        with contextlib.suppress(OutOfMemory):
            graph = self._graphs.get_or_make(key, lambda: self._capture(halves))
            if graph is None or graph.is_valid:
                return graph
        # It was recorded with what has moved since, or the others leave no room for it.
        self._graphs.clear()
        return self._graphs.get_or_make(key, lambda: self._capture(halves))

    def disable_capture(self) -> None:
        """Record nothing from now on: what an attempt takes, and what has to go for it, would be lost each time."""
        self._captures = False

    def replay(self, graph: CapturedGraph, steps: int) -> None:
        """Enqueue a recorded generation of so many steps."""
        graph.replay()
        self._current = steps % 2

    def _capture(self, halves: Sequence[int]) -> CapturedGraph | None:
        # Libraries load code and choose among it when something runs for the first time, which cannot be recorded.
        # Twice, since what is needed to compute in may grow, and move, until all of them have run.
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
        """A copy of one of `STATE`, after everything enqueued so far."""
        return self._backend.download(self._states[self._current][name])

    def read_images(self) -> Array:
        """What was decoded last, uint8 [B,H,W,3]."""
        return self._backend.download(self._images["image"])

    def _upload_table(self, name: str, rows: Array) -> None:
        """Tables keep their place, which recordings know, and are replaced by longer ones where they are too short."""
        table = self._tables.get(name)
        if table is None or table.shape[0] < len(rows):
            self._graphs.clear()
            shape = (max(len(rows), _TABLE_ROWS[name]), *self._inputs[name].shape)
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
