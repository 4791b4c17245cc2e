"""Choose kernels by rule where none can be measured, by patching functions inside PyTorch.

Matrix products and convolutions use cuBLAS and cuDNN. Where inductor offers several block sizes for a generated kernel,
a reduction gets eight rows per block if offered; everything else gets the first, as inductor itself chooses when told
not to measure.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from moma_rt.errors import BundleError

# Settings of `torch._inductor.config` that turn measuring off.
SETTINGS = MappingProxyType(
    {
        "max_autotune": False,
        "max_autotune_gemm_backends": "ATEN",
        # Padding measures whether a padded product is faster.
        "shape_padding": False,
        "triton.autotune_at_compile_time": True,
    }
)
_HEURISTICS = "torch._inductor.runtime.triton_heuristics"
_AUTOTUNE, _BENCH = f"{_HEURISTICS}.cached_autotune", f"{_HEURISTICS}.CachingAutotuner.bench"
_CONFIG = "torch._inductor.config"
# The parameter of `cached_autotune` that takes the configurations.
_CONFIGS = "configs"
_ROWS, _COLUMNS, _FEW_ROWS = "XBLOCK", "YBLOCK", 8


def choose(configs: Sequence[Any]) -> Any:
    """Return the one of Triton's configurations to compile; each has its block sizes in `kwargs`."""
    few_rows = (c for c in configs if c.kwargs.get(_ROWS) == _FEW_ROWS and _COLUMNS not in c.kwargs)
    return next(few_rows, configs[0])


def look_up(path: str) -> tuple[Any, str, Any]:
    """Resolve a dotted path inside PyTorch to its owner, its name in the owner, and its value.

    Raises:
        BundleError: this PyTorch does not have it.
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:split]))
            break
        except ModuleNotFoundError:
            continue
    else:
        raise _missing(path)
    for name in parts[split:-1]:
        owner = getattr(owner, name, None)
    if owner is None or not hasattr(owner, parts[-1]):
        raise _missing(path)
    return owner, parts[-1], getattr(owner, parts[-1])


def check() -> None:
    """Check that PyTorch still has every internal that cross-compiling uses.

    Raises:
        BundleError: something is missing, or takes other arguments.
    """
    _, _, autotune = look_up(_AUTOTUNE)
    if list(inspect.signature(autotune).parameters)[1:2] != [_CONFIGS]:
        raise _missing(f"{_AUTOTUNE}(..., {_CONFIGS})")
    look_up(_BENCH)
    _, _, config = look_up(_CONFIG)
    known = config.get_config_copy()
    for name in SETTINGS:
        if name not in known:
            raise _missing(f"{_CONFIG}.{name}")


def install() -> Callable[[], int]:
    """Make this process choose kernels by rule, irreversibly: for a process that compiles and ends.

    Returns:
        A function that returns the number of kernels chosen so far.

    Raises:
        BundleError: see `check`.
    """
    check()
    heuristics, name, autotune = look_up(_AUTOTUNE)
    chosen = 0

    def by_rule(size_hints: Any, configs: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        nonlocal chosen
        chosen += 1
        return autotune(size_hints, [choose(configs)], *arguments, **options)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("inductor tried to measure a kernel, but there is no device")

    setattr(heuristics, name, by_rule)
    autotuner, name, _ = look_up(_BENCH)
    setattr(autotuner, name, refuse)
    return lambda: chosen


def _missing(path: str) -> BundleError:
    import torch

    return BundleError(
        f"PyTorch {torch.__version__}: {path} is missing, and cross-compiling needs it: install PyTorch 2.11 to 2.13, "
        "or build on the device itself with --target inductor"
    )
