"""Subjects in the memory of a device, so that going from one to another copies within it."""

from collections.abc import Mapping

from moma_rt.backends.base import Backend, Buffer, nbytes
from moma_rt.lru import Lru
from moma_rt.specs import NetworkSpec
from moma_rt.subject import Subject

# More than any budget has room for.
_MOST = 1 << 20


class Residents:
    """The subjects that were used last, as far as `budget` bytes go.

    Each is a Subject in the host's memory as well, so one that had to go is uploaded again. Nothing is kept where the
    device's memory is the host's.
    """

    def __init__(self, backend: Backend, budget: int) -> None:
        self._backend = backend
        self._kept: Lru[str, Mapping[str, Buffer]] = Lru(_MOST, _size, budget)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, subject: Subject, denoiser: NetworkSpec) -> Mapping[str, Buffer]:
        """A subject's inputs of the denoiser, in its dtypes: keys and values [N_g,C], object masks [N_g].

        Raises:
            OutOfMemory: there is no room for it.
        """
        if self._backend.is_host:
            return self._upload(subject, denoiser)
        return self._kept.get_or_make(subject.identity, lambda: self._upload(subject, denoiser))

    def clear(self) -> None:
        """Let all of them go."""
        self._kept.clear()

    def _upload(self, subject: Subject, denoiser: NetworkSpec) -> Mapping[str, Buffer]:
        arrays = subject.inputs()
        buffers = self._backend.allocate({name: (a.shape, denoiser.tensor(name).dtype) for name, a in arrays.items()})
        for name, array in arrays.items():
            self._backend.upload(buffers[name], array)
        return buffers


def _size(buffers: Mapping[str, Buffer]) -> int:
    return sum(map(nbytes, buffers.values()))
