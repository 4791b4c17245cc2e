"""What subjects consist of, in the memory of a device, so that going from one to another uploads nothing."""

import contextlib
from collections.abc import Mapping
from functools import partial

from moma_rt.backends.base import Array, Buffer, nbytes
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import OutOfMemory
from moma_rt.memory.lru import Lru
from moma_rt.memory.networks import Networks
from moma_rt.subject import Prefix, Subject

# More than any budget has room for.
_MOST = 1 << 20


class SubjectCache:
    """The subjects that were used last, as far as `budget` bytes go.

    Each is a Subject in the host's memory as well, so one that had to go is uploaded again. Nothing is kept where the
    device's memory is the host's. All go when there is no room for another, and when a network is unloaded: the device
    is short of memory then.
    """

    def __init__(self, networks: Networks, budget: int) -> None:
        self._networks = networks
        self._kept: Lru[tuple[str, str], Mapping[str, Buffer]] = Lru(_MOST, _size, budget)
        networks.on_unload(self._evict)

    def reference(self, subject: Subject) -> Mapping[str, Buffer]:
        """A subject's inputs of the denoiser, in its dtypes: keys and values [N_g,C], object masks [N_g].

        Raises:
            OutOfMemory: there is no room for them.
        """
        return self._get("denoiser", subject, subject.inputs())

    def prefix_kv(self, subject: Subject, prefix: Prefix) -> Array | Buffer:
        """The whole of a subject's prefix, as the language model's input [layers, 2, KV heads, P, head width].

        Raises:
            OutOfMemory: there is no room for it.
        """
        if self._networks.backend.is_host:
            return prefix.kv
        return self._get("language_model", subject, {"past_kv": prefix.kv})["past_kv"]

    def _get(self, name: str, subject: Subject, arrays: Mapping[str, Array]) -> Mapping[str, Buffer]:
        make = partial(self._upload, self._networks.bundle.network(name).spec, arrays)
        if self._networks.backend.is_host:
            return make()
        key = (name, subject.identity)
        with contextlib.suppress(OutOfMemory):
            return self._kept.get_or_make(key, make)
        # Others are uploaded again in milliseconds; whatever else could make room takes seconds to be there again.
        self._kept.clear()
        self._networks.backend.synchronize()
        return self._kept.get_or_make(key, make)

    def _upload(self, spec: NetworkSpec, arrays: Mapping[str, Array]) -> Mapping[str, Buffer]:
        backend = self._networks.backend
        buffers = backend.allocate({name: (array.shape, spec.tensor(name).dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            backend.upload(buffers[name], array)
        return buffers

    def _evict(self, _: str) -> None:
        self._kept.clear()


def _size(buffers: Mapping[str, Buffer]) -> int:
    return sum(map(nbytes, buffers.values()))
