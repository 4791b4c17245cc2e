"""The cache of kernels that TensorRT-RTX compiles on the device, kept on disk between processes.

An RTX engine contains no kernels for a particular device; they are compiled when needed, which takes seconds to
minutes. The library stamps its cache with its own version, the device and the driver, and rejects one that does not
match.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moma_rt.bundle.engines import Flavour
from moma_rt.files import atomic_write


class JitCache:
    """The compiled kernels of one engine. `serialize` returns them; `file` caches them, unless it is None."""

    def __init__(self, runtime_config: Any, serialize: Callable[[], Any], file: Path | None, cached: bytes) -> None:
        self.runtime_config = runtime_config
        self._serialize = serialize
        self._file = file
        self._cached = cached

    def save(self) -> None:
        """Write newly compiled kernels to the file; if that fails, the next process compiles them again."""
        serialized = self._serialize()
        # None if the library fails, which must not fail a generation that succeeded.
        found = self._cached if serialized is None else bytes(memoryview(serialized))
        if self._file is not None and found != self._cached:
            self._cached = found
            with contextlib.suppress(OSError), atomic_write(self._file) as path:
                path.write_bytes(found)


def load_jit_cache(flavour: Flavour, trt: Any, engine: Any, engine_file: Path, is_captured: bool) -> JitCache | None:
    """Configure how an engine's contexts compile kernels, and load the cached ones; None for TensorRT itself.

    If runs are captured, kernels for the bound shapes are compiled before the first run: a graph must not contain the
    slower fallback kernels. Otherwise they are compiled in the background, since prompts come in many lengths and no
    request should wait for each.
    """
    if flavour is not Flavour.TENSORRT_RTX:
        return None
    runtime_config = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    runtime_config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if is_captured
        else trt.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    runtime_config.set_runtime_cache(runtime_config.create_runtime_cache())
    file, cached = _cache_file(engine_file), b""
    with contextlib.suppress(OSError):
        cached = b"" if file is None else file.read_bytes()
    if cached and not runtime_config.get_runtime_cache().deserialize(cached):
        cached = b""
    return JitCache(runtime_config, runtime_config.get_runtime_cache().serialize, file, cached)


def is_capturable(flavour: Flavour, context: Any, stream_handle: int) -> bool:
    """Whether a context that has run on the stream can be captured there.

    TensorRT itself cannot be asked: this is True, and the capture may fail.
    """
    if flavour is not Flavour.TENSORRT_RTX:
        return True
    return bool(context.is_stream_capturable(stream_handle))


def _cache_file(engine_file: Path) -> Path | None:
    """The file in the user's cache folder; None without a home. A bundle must not contain code outside its manifest.

    The name of the engine's folder identifies everything that the engine depends on.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # That variable counts only if it is absolute: a relative one would follow the process's working folder.
        home = home if home.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return home / "moma-rt" / "tensorrt_rtx" / f"{engine_file.parent.name}.cache"
