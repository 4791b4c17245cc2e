"""How kernels are chosen where none can be measured, and what of PyTorch that leans on.

Products and convolutions are those of cuBLAS and cuDNN. Where inductor generates a kernel with several block sizes, a
reduction gets eight rows a block if that is among them; everything else gets the first of them, which inductor itself
takes where it is told not to measure.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from moma_rt.errors import BundleError

# Of `torch._inductor.config`, in place of what measures.
SETTINGS = MappingProxyType(
    {
        "max_autotune": False,
        "max_autotune_gemm_backends": "ATEN",
        # It measures whether a padded product is faster.
        "shape_padding": False,
        "triton.autotune_at_compile_time": True,
    }
)
_HEURISTICS = "torch._inductor.runtime.triton_heuristics"
_AUTOTUNE, _BENCH = f"{_HEURISTICS}.cached_autotune", f"{_HEURISTICS}.CachingAutotuner.bench"
_CONFIG = "torch._inductor.config"
# A function of PyTorch's, and the parameter by which it is told the configurations.
_CONFIGS = "configs"
_ROWS, _COLUMNS, _FEW_ROWS = "XBLOCK", "YBLOCK", 8


def choose(configs: Sequence[Any]) -> Any:
    """The configuration that is compiled: of Triton's, each with its block sizes in `kwargs`."""
    few_rows = (c for c in configs if c.kwargs.get(_ROWS) == _FEW_ROWS and _COLUMNS not in c.kwargs)
    return next(few_rows, configs[0])


def look_up(path: str) -> tuple[Any, str, Any]:
    """What a dotted path names inside PyTorch: its owner, its name there, and itself.

    Raises:
        BundleError: PyTorch has it no more.
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:split]))
            break
        except ModuleNotFoundError:
            continue
    else:
        raise _gone(path)
    for name in parts[split:-1]:
        owner = getattr(owner, name, None)
    if owner is None or not hasattr(owner, parts[-1]):
        raise _gone(path)
    return owner, parts[-1], getattr(owner, parts[-1])


def check() -> None:
    """Look up everything that cross-compiling leans on inside PyTorch.

    Raises:
        BundleError: something is gone, or takes other arguments.
    """
    _, _, autotune = look_up(_AUTOTUNE)
    if list(inspect.signature(autotune).parameters)[1:2] != [_CONFIGS]:
        raise _gone(f"{_AUTOTUNE}(..., {_CONFIGS})")
    look_up(_BENCH)
    _, _, config = look_up(_CONFIG)
    known = config.get_config_copy()
    for name in SETTINGS:
        if name not in known:
            raise _gone(f"{_CONFIG}.{name}")


def install() -> Callable[[], int]:
    """Have this process choose by rule; for a process that compiles and ends.

    Returns:
        Tells of how many kernels one was chosen.

    Raises:
        BundleError: as of `check`.
    """
    check()
    heuristics, name, autotune = look_up(_AUTOTUNE)
    chosen = 0

    def by_rule(size_hints: Any, configs: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        nonlocal chosen
        chosen += 1
        return autotune(size_hints, [choose(configs)], *arguments, **options)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a kernel was to be measured, and there is no device")

    setattr(heuristics, name, by_rule)
    autotuner, name, _ = look_up(_BENCH)
    setattr(autotuner, name, refuse)
    return lambda: chosen


def _gone(path: str) -> BundleError:
    import torch

    return BundleError(
        f"PyTorch {torch.__version__}: {path} is gone, and cross-compiling leans on it: install a PyTorch from 2.11 to "
        "2.13, or build on the device itself with --target inductor"
    )
