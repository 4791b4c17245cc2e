"""What TensorRT-RTX compiles on the device, and where it keeps it between processes.

An RTX engine holds kernels for no device in particular; those for this one are compiled as they are needed, which takes
seconds to minutes. Its library marks what it compiled with its own version, the device and the driver, and refuses what
fits none of them.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moma_rt.bundle.engines import Flavour
from moma_rt.files import atomic_write


class JustInTime:
    """The kernels of one engine for this device. `serialize` gives them, as they are kept in `file`, if anywhere."""

    def __init__(self, runtime_config: Any, serialize: Callable[[], Any], file: Path | None, known: bytes) -> None:
        self.runtime_config = runtime_config
        self._serialize = serialize
        self._file = file
        self._known = known

    def save(self) -> None:
        """Keep what was compiled since; where it cannot be written, the next process compiles it again."""
        serialized = self._serialize()
        # None where the library fails, which is no reason to lose what was computed.
        found = self._known if serialized is None else bytes(memoryview(serialized))
        if self._file is not None and found != self._known:
            self._known = found
            with contextlib.suppress(OSError), atomic_write(self._file) as path:
                path.write_bytes(found)


def just_in_time(flavour: Flavour, trt: Any, engine: Any, engine_file: Path, is_recorded: bool) -> JustInTime | None:
    """How contexts of an engine are to compile, with what earlier processes compiled; None for TensorRT itself.

    Where runs are recorded, kernels are compiled for the shapes that are bound before anything runs on them: a
    recording must not hold the slower ones that would be run meanwhile. Others are compiled in the background, since
    prompts come in many lengths and nobody is to wait for each.
    """
    if flavour is not Flavour.TENSORRT_RTX:
        return None
    runtime_config = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    runtime_config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if is_recorded
        else trt.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    runtime_config.set_runtime_cache(runtime_config.create_runtime_cache())
    file, known = _place(engine_file), b""
    with contextlib.suppress(OSError):
        known = b"" if file is None else file.read_bytes()
    if known and not runtime_config.get_runtime_cache().deserialize(known):
        known = b""
    return JustInTime(runtime_config, runtime_config.get_runtime_cache().serialize, file, known)


def is_capturable(flavour: Flavour, context: Any, stream_handle: int) -> bool:
    """Whether a context, which has run on the stream, can be captured there, as far as one can ask.

    TensorRT itself does not say: there the capture fails.
    """
    if flavour is not Flavour.TENSORRT_RTX:
        return True
    return bool(context.is_stream_capturable(stream_handle))


def _place(engine_file: Path) -> Path | None:
    """In the user's own cache, not in the bundle: it is code that no manifest describes. None without a home.

    The engine's folder is named after all that the engine depends on.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "moma-rt" / "tensorrt_rtx" / f"{engine_file.parent.name}.cache"
