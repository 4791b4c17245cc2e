"""The memory in which pictures are made: allocated and bound once, used by every generation of its size."""

from collections.abc import Iterable, Mapping

import numpy as np

from moma_rt.backends.base import Array, Backend, Bound, Buffer, Network
from moma_rt.specs import NetworkSpec

# What a step reads of itself and hands to the next one; the denoiser's outputs are named next_<name>.
STATE = ("latents", "history", "foreground_mask")
# What the halves of guidance differ in: their batch is that of the halves together.
CONDITIONS = ("text_tokens", "context_tokens")


class GenerationBuffers:
    """Owns every buffer of the denoiser and the VAE decoder for one batch size, choice of guidance and reference size.

    The state lies in two sets of buffers. Even steps read the first and write the second, odd steps the other
    way round; each direction is bound once, so a step uploads 256 bytes and allocates nothing. A step computes as many
    halves of guidance as it has conditions for: each number of `halves` has its own conditions, and shares the rest.

    sizes: of the denoiser's dynamic dimensions but guided_batch, which is halves times batch.
    halves: the numbers of halves that steps will have, 2 with guidance and 1 without.
    """

    def __init__(
        self,
        backend: Backend,
        denoiser: Network,
        decoder: Network,
        sizes: Mapping[str, int],
        halves: Iterable[int],
    ) -> None:
        self._backend = backend
        self._batch = sizes["batch"]
        shared = (t.name for t in denoiser.spec.inputs)
        self._inputs = _allocate(backend, denoiser.spec, sizes, shared, (*STATE, *CONDITIONS))
        self._conditions = {
            count: _allocate(backend, denoiser.spec, {**sizes, "guided_batch": count * self._batch}, CONDITIONS)
            for count in halves
        }
        self._states = tuple(_allocate(backend, denoiser.spec, sizes, STATE) for _ in range(2))
        self._images = _allocate(backend, decoder.spec, sizes, ("image",))
        self._steps = {count: tuple(self._bind_step(denoiser, count, i) for i in range(2)) for count in halves}
        self._decoders = tuple(
            decoder.bind({"latents": state["latents"], "image": self._images["image"]}) for state in self._states
        )
        self._current = 0
        self._resident = ""

    def _bind_step(self, denoiser: Network, halves: int, parity: int) -> Bound:
        following = {f"next_{name}": buffer for name, buffer in self._states[1 - parity].items()}
        return denoiser.bind({**self._inputs, **self._conditions[halves], **self._states[parity], **following})

    def begin(self, latents_bchw: Array) -> None:
        """Start over from these latents, float32 [B,4,h,w], with no history and a foreground of ones."""
        self._current = 0
        state = self._states[0]
        self._backend.upload(state["latents"], latents_bchw)
        self._fill(state["history"], 0.0)
        self._fill(state["foreground_mask"], 1.0)
        self._fill(self._inputs["noise"], 0.0)

    def hold(self, owner: str, inputs: Mapping[str, Array]) -> None:
        """Upload inputs of one sample, repeated over the batch, unless they are still here from the same owner."""
        if owner == self._resident:
            return
        self._resident = ""
        for name, sample in inputs.items():
            self.upload(name, np.broadcast_to(sample, self._inputs[name].shape))
        self._resident = owner

    def upload(self, name: str, array: Array) -> None:
        """Copy an array into a denoiser input that is neither state nor condition."""
        self._backend.upload(self._inputs[name], array)

    def condition(self, name: str, array_g: Array) -> None:
        """Copy one of `CONDITIONS`, [G, ...] with the unconditional half first, over the batch.

        Steps of one half take the conditional one.
        """
        for halves, buffers in self._conditions.items():
            self._backend.upload(buffers[name], array_g[-halves:].repeat(self._batch, axis=0))

    def step(self, halves: int) -> None:
        """Enqueue one denoising step with or without guidance and make its outputs the state of the next."""
        self._steps[halves][self._current].enqueue()
        self._current = 1 - self._current

    def state(self, name: str) -> Array:
        """A copy of one of `STATE`, after everything enqueued so far."""
        return self._backend.download(self._states[self._current][name])

    def decode(self) -> Array:
        """Decode the current latents to uint8 [B,H,W,3]."""
        self._decoders[self._current].enqueue()
        return self._backend.download(self._images["image"])

    def _fill(self, buffer: Buffer, value: float) -> None:
        self._backend.upload(buffer, np.broadcast_to(np.float32(value), buffer.shape))


def _allocate(
    backend: Backend,
    spec: NetworkSpec,
    sizes: Mapping[str, int],
    names: Iterable[str],
    but: tuple[str, ...] = (),
) -> dict[str, Buffer]:
    tensors = [spec.tensor(name) for name in names if name not in but]
    return {t.name: backend.allocate(t.resolve(**sizes), t.dtype) for t in tensors}
