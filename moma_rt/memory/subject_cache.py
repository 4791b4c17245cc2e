"""Cache of subjects' tensors in device memory, so that switching between subjects uploads nothing."""

import contextlib
from collections.abc import Mapping
from functools import partial

from moma_rt.backends.base import Array, Buffer, nbytes
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import OutOfMemory
from moma_rt.memory.lru import Lru
from moma_rt.memory.networks import Networks
from moma_rt.subject import Prefix, Subject

# Only bytes are limited.
_UNLIMITED = 1 << 20


class SubjectCache:
    """Caches the tensors of the most recently used subjects on the device, up to `budget` bytes.

    An evicted subject is uploaded again from its `Subject` in host memory. Nothing is cached if the device's memory is
    the host's. All subjects are evicted when an upload runs out of memory, and when a network is unloaded, since the
    device is short of memory then.
    """

    def __init__(self, networks: Networks, budget: int) -> None:
        self._networks = networks
        self._cached: Lru[tuple[str, str], Mapping[str, Buffer]] = Lru(_UNLIMITED, _size, budget)
        networks.on_eviction(self._evict)

    def reference(self, subject: Subject) -> Mapping[str, Buffer]:
        """Return a subject's denoiser inputs, in the denoiser's dtypes: keys and values [N_g,C], object masks [N_g].

        Raises:
            OutOfMemory: too little device memory, even with all other subjects evicted.
        """
        return self._get("denoiser", subject, subject.inputs())

    def prefix_kv(self, subject: Subject, prefix: Prefix) -> Array | Buffer:
        """Return a subject's prefix K/V, the language model's input [layers, 2, KV heads, P, head width].

        Raises:
            OutOfMemory: too little device memory, even with all other subjects evicted.
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
            return self._cached.get_or_make(key, make)
        # Evict other subjects first: they are uploaded again in milliseconds, other caches take seconds to rebuild.
        self._cached.clear()
        self._networks.backend.synchronize()
        return self._cached.get_or_make(key, make)

    def _upload(self, spec: NetworkSpec, arrays: Mapping[str, Array]) -> Mapping[str, Buffer]:
        backend = self._networks.backend
        buffers = backend.allocate({name: (array.shape, spec.tensor(name).dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            backend.upload(buffers[name], array)
        return buffers

    def _evict(self, _: str) -> None:
        self._cached.clear()


def _size(buffers: Mapping[str, Buffer]) -> int:
    return sum(map(nbytes, buffers.values()))
