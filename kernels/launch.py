"""The kernels' launch configurations: block sizes, warps and pipeline stages, by shape, dtype and compute capability.

The tables were chosen from the compiler's report (registers, spills and shared memory, as printed by
`python -m kernels.compile`), not from timings; `python -m benchmarks.kernels --tune` times the alternatives on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

# The compute capabilities that kernels are compiled for; the tables assume their instructions.
CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
# Compiled by default: A100, RTX 30, Orin, RTX 40 and L40S, H100 and H200, B200, RTX 50.
DEFAULT_CAPABILITIES = (80, 86, 87, 89, 90, 100, 120)
# The limit unless a launcher opts in to more shared memory, which TensorRT is not known to do.
PORTABLE_SHARED_BYTES = 48 * 1024
# The smallest size of an axis in `tl.dot`.
_MIN_DOT_SIZE = 16
# Up to this many queries, blocks of 64 leave most of a device idle.
_FEW_QUERIES = 256


@dataclass(frozen=True)
class LaunchConfig:
    """Queries per program, tokens per iteration, warps per program, and stages of the load pipeline."""

    block_queries: int
    block_tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionShape:
    """What determines the launch of an attention layer: queries, head width, and bytes per element."""

    queries: int
    width: int
    element_bytes: int


# By the widest head they suit. The first launch may use all shared memory, the second fits PORTABLE_SHARED_BYTES.
# Three stages where they fit: with two, the next tokens are loaded only after this block's last product.
_Row = tuple[LaunchConfig, LaunchConfig]
_Choice = TypeVar("_Choice")
_SELF_MMA: Mapping[int, _Row] = MappingProxyType(
    {
        48: (LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3)),
        64: (LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3)),
        96: (LaunchConfig(64, 32, 4, 3), LaunchConfig(64, 32, 4, 3)),
        128: (LaunchConfig(64, 32, 4, 3), LaunchConfig(64, 16, 4, 3)),
        160: (LaunchConfig(64, 16, 4, 3), LaunchConfig(64, 16, 4, 3)),
    }
)
# Hopper's and datacenter Blackwell's tensor cores read operands from shared memory, so it holds the queries as well.
_SELF_WGMMA: Mapping[int, _Row] = MappingProxyType(
    {
        48: (LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 32, 8, 3)),
        64: (LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 32, 4, 3)),
        96: (LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 32, 4, 3)),
        128: (LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 16, 4, 3)),
        160: (LaunchConfig(64, 32, 4, 3), LaunchConfig(64, 32, 4, 1)),
    }
)
_SELF_FEW = LaunchConfig(32, 16, 4, 3)
_CROSS: Mapping[int, LaunchConfig] = MappingProxyType({96: LaunchConfig(32, 32, 2, 3), 160: LaunchConfig(16, 16, 1, 3)})
# For wider heads, and for fp32: its tiles are twice as large, tensor cores do not help, and no network here uses it.
_FALLBACK = LaunchConfig(16, 16, 4, 1)


def split_width(width: int) -> tuple[int, int]:
    """Split a head width into a main part and a tail (0: none), each a power of two that `tl.dot` accepts.

    >>> split_width(40), split_width(64), split_width(160)
    ((32, 16), (64, 0), (128, 32))
    """
    main = max(_MIN_DOT_SIZE, 1 << (width.bit_length() - 1))
    rest = width - main
    return (main, 0) if rest <= 0 else (main, max(_MIN_DOT_SIZE, 1 << (rest - 1).bit_length()))


def self_attention_launch(shape: AttentionShape, capability: int, *, portable: bool = False) -> LaunchConfig:
    """Return the launch configuration of `moma::InjectedSelfAttention`.

    Args:
        capability: the device's compute capability, 90 for 9.0.
        portable: stay within PORTABLE_SHARED_BYTES, which a launch by TensorRT requires.
    """
    table = _SELF_WGMMA if capability // 10 in (9, 10) else _SELF_MMA
    row = _lookup(table, shape)
    if row is None:
        return _FALLBACK
    if shape.queries <= _FEW_QUERIES:
        return _SELF_FEW
    return row[1] if portable else row[0]


def cross_attention_launch(shape: AttentionShape) -> LaunchConfig:
    """Return the launch configuration of `moma::ContextCrossAttention`, always within PORTABLE_SHARED_BYTES."""
    return _lookup(_CROSS, shape) or _FALLBACK


def _lookup(table: Mapping[int, _Choice], shape: AttentionShape) -> _Choice | None:
    widest = next((width for width in table if shape.width <= width), None)
    return None if widest is None or shape.element_bytes > 2 else table[widest]
