"""How the kernels are launched: block sizes, warps and pipeline stages, from shape, precision and compute capability.

The tables were chosen by the compiler's report (registers, spills, shared memory: `python -m kernels.compile` writes
it), not by a stopwatch; `python -m benchmarks.kernels --tune` measures the alternatives on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

# The compute capabilities that kernels are compiled for; with them came the instructions that make these tables.
CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
# Where nothing is said: A100, RTX 30, Orin, RTX 40 and L40S, H100 and H200, B200, RTX 50.
DEFAULT_CAPABILITIES = (80, 86, 87, 89, 90, 100, 120)
# What a kernel may use unless its launcher asks the driver for more, which TensorRT is not known to do.
PORTABLE_SHARED_BYTES = 48 * 1024
# The least that `tl.dot` takes on any axis.
_LEAST = 16
# At most this many queries leave most of a device idle with blocks of 64.
_FEW_QUERIES = 256


@dataclass(frozen=True)
class LaunchConfig:
    """A program's queries, the tokens it reads at a time, its warps, and the stages of its loads' pipeline."""

    block_queries: int
    block_tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionShape:
    """What a launch depends on of an attention layer: queries, the width of a head, and bytes an element."""

    queries: int
    width: int
    element_bytes: int


# By the widest head. Two choices: what is best where shared memory is to be had, and what PORTABLE_SHARED_BYTES admit.
# Three stages, where they fit: with two the next tokens are loaded after this block's last product, and waited for.
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
# Hopper's and datacenter Blackwell's tensor cores read their operands from shared memory, so the queries lie there too.
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
# Any head width, and fp32: its tiles are twice as large, no tensor core multiplies it, and no network here is in it.
_FRUGAL = LaunchConfig(16, 16, 4, 1)


def split_width(width: int) -> tuple[int, int]:
    """A head's width as a main part and a tail (0: none) that cover it, each a power of two that `tl.dot` takes.

    >>> split_width(40), split_width(64), split_width(160)
    ((32, 16), (64, 0), (128, 32))
    """
    main = max(_LEAST, 1 << (width.bit_length() - 1))
    rest = width - main
    return (main, 0) if rest <= 0 else (main, max(_LEAST, 1 << (rest - 1).bit_length()))


def self_attention_launch(shape: AttentionShape, capability: int, *, portable: bool = False) -> LaunchConfig:
    """The launch of `moma::InjectedSelfAttention`'s kernel.

    Args:
        capability: the device's compute capability, 90 for 9.0.
        portable: keep within PORTABLE_SHARED_BYTES, as a launch by TensorRT must.
    """
    table = _SELF_WGMMA if capability // 10 in (9, 10) else _SELF_MMA
    row = _fitting(table, shape)
    if row is None:
        return _FRUGAL
    if shape.queries <= _FEW_QUERIES:
        return _SELF_FEW
    return row[1] if portable else row[0]


def cross_attention_launch(shape: AttentionShape) -> LaunchConfig:
    """The launch of `moma::ContextCrossAttention`'s kernel, within PORTABLE_SHARED_BYTES on every device."""
    return _fitting(_CROSS, shape) or _FRUGAL


def _fitting(table: Mapping[int, _Choice], shape: AttentionShape) -> _Choice | None:
    widest = next((width for width in table if shape.width <= width), None)
    return None if widest is None or shape.element_bytes > 2 else table[widest]
