"""The memory that a bundle's networks need, and which of them fit a budget."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.manifest import Manifest
from moma_rt.errors import InputError
from moma_rt.messages import short_repr

# Every generation needs both, so they are loaded together; any other network can be loaded alone.
GENERATION_NETWORKS = ("denoiser", "vae_decoder")
_UNITS = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30})
_SIZE = re.compile(r"(\d{1,16}(?:\.\d{1,9})?)\s*([KMG]I?|)B?", re.IGNORECASE | re.ASCII)
# A pebibyte, more than any machine has.
_MAX_BYTES = 1 << 50


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights, and of its activations at its largest shapes; 0 if unknown.

    `shared` maps files of further weights to their bytes: networks that read the same file load it once.
    """

    weights: int
    activations: int
    shared: Mapping[str, int] = field(default_factory=dict)


def footprint(manifest: Manifest, name: str, engine: EngineEntry | None) -> Footprint:
    """Estimate a network's memory: as an engine by its builder's count, as an ONNX graph by the files' sizes.

    Inductor's engines read their weights files in place and share them. ONNX Runtime copies most weights into another
    layout, so its networks share none.
    """
    network = manifest.networks[name]
    weights = {file: manifest.files[file].size for file in network.weights}
    if engine is None:
        return Footprint(sum(weights.values()) + sum(manifest.files[file].size for file in network.graphs[:1]), 0)
    size = manifest.files[engine.file].size if engine.weight_bytes is None else engine.weight_bytes
    return Footprint(size, engine.activation_bytes or 0, weights if engine.flavour.reads_weights else {})


def combined_bytes(footprints: Iterable[Footprint]) -> int:
    """Bytes of several loaded networks. They run one after the other, so they share memory for activations."""
    found = list(footprints)
    shared = {file: size for footprint in found for file, size in footprint.shared.items()}
    own = sum(footprint.weights for footprint in found)
    return own + sum(shared.values()) + max((footprint.activations for footprint in found), default=0)


def load_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group the networks that must be loaded at the same time."""
    every = list(names)
    generation = tuple(name for name in every if name in GENERATION_NETWORKS)
    return [*((name,) for name in every if name not in GENERATION_NETWORKS), *([generation] if generation else [])]


def parse_bytes(given: object, what: str = "a memory budget") -> int:
    """Parse a number of bytes, or a text such as 8GB (10^9) or 512 MiB (2^20).

    Raises:
        InputError: neither of them, or not from 1 to 2**50 - 1. The message begins with `what`.
    """
    match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is not None:
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(given, int | np.integer) and not isinstance(given, bool):
        count = int(given)
    else:
        count = 0
    if not 0 < count < _MAX_BYTES:
        raise InputError(
            f"{what} is a number of bytes below 2**50, or a text such as 8GB or 512MiB, not {short_repr(given)}"
        )
    return count


def describe_budget(manifest: Manifest, engines: Mapping[str, EngineEntry] | None, budget: int) -> list[str]:
    """Describe which networks of a bundle fit a budget, in one line each and a summary."""
    needs = {
        name: footprint(manifest, name, None if engines is None else engines[name])
        for name in manifest.networks
        if engines is None or name in engines
    }
    lines, too_large = [], []
    for group in load_groups(needs):
        size = combined_bytes(needs[name] for name in group)
        lines.append(f"  {' + '.join(group):<24} {format_bytes(size):>10}  {_verdict(size, budget)}")
        too_large += [] if size <= budget else [" + ".join(group)]
    size = combined_bytes(needs.values())
    lines.append(f"  {'all of them':<24} {format_bytes(size):>10}  {_verdict(size, budget)}")
    if size <= budget:
        lines.append("  every network stays loaded")
    elif not too_large:
        lines.append("  networks are loaded in turn (memory_budget, --memory-budget)")
    elif set(too_large) <= {"language_model", "vision_encoder"}:
        lines.append("  networks are loaded in turn; enough only to generate from a context embedding, not to enroll")
    else:
        lines.append(f"  the bundle does not fit: too large are {', '.join(too_large)}")
    return lines


def format_bytes(count: int | None) -> str:
    """Format a size for people, such as 1.5 KiB; None is 'unknown'."""
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} GiB"


def _three_digits(size: float) -> str:
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"


def _verdict(size: int, budget: int) -> str:
    return "fits" if size <= budget else "does not fit"
