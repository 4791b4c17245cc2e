"""How much memory a bundle's networks need, and which of them fit a budget."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.manifest import Manifest
from moma_rt.errors import InputError
from moma_rt.messages import short_repr

# What is loaded at the same time: a network for itself, but for the two that every picture is made with.
GENERATION_NETWORKS = ("denoiser", "vae_decoder")
_UNITS = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30})
_SIZE = re.compile(r"(\d{1,16}(?:\.\d{1,9})?)\s*([KMG]I?|)B?", re.IGNORECASE | re.ASCII)
# A pebibyte, more than any machine has.
_MOST = 1 << 50


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights, and of what it computes in at its largest shapes; 0 where that is not known.

    `shared` are further weights by the file that they lie in: networks that read one file hold it once.
    """

    weights: int
    activations: int
    shared: Mapping[str, int] = field(default_factory=dict)


def footprint(manifest: Manifest, name: str, engine: EngineEntry | None) -> Footprint:
    """What a network needs as an engine, by its builder's count, or as its ONNX graph, by the files' sizes.

    Weights files that an engine of inductor reads in place are shared. ONNX Runtime rearranges most of what it maps, so
    each of its networks counts for itself.
    """
    network = manifest.networks[name]
    weights = {file: manifest.files[file].size for file in network.weights}
    if engine is None:
        return Footprint(sum(weights.values()) + sum(manifest.files[file].size for file in network.graphs[:1]), 0)
    size = manifest.files[engine.file].size if engine.weight_bytes is None else engine.weight_bytes
    return Footprint(size, engine.activation_bytes or 0, weights if engine.flavour.reads_weights else {})


def combined_bytes(footprints: Iterable[Footprint]) -> int:
    """Bytes that networks need when all are loaded: they run one after the other, and share what they compute in."""
    found = list(footprints)
    shared = {file: size for footprint in found for file, size in footprint.shared.items()}
    own = sum(footprint.weights for footprint in found)
    return own + sum(shared.values()) + max((footprint.activations for footprint in found), default=0)


def load_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Networks that have to be loaded at the same time."""
    every = list(names)
    pictures = tuple(name for name in every if name in GENERATION_NETWORKS)
    return [*((name,) for name in every if name not in GENERATION_NETWORKS), *([pictures] if pictures else [])]


def parse_bytes(given: object, what: str = "a memory budget") -> int:
    """A number of bytes, or a text such as 8GB (10^9) or 512 MiB (2^20).

    Raises:
        InputError: neither of them, or not more than 0. The message begins with `what`.
    """
    match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is not None:
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(given, int | np.integer) and not isinstance(given, bool):
        count = int(given)
    else:
        count = 0
    if not 0 < count < _MOST:
        raise InputError(
            f"{what} is a number of bytes below 2**50, or a text such as 8GB or 512MiB, not {short_repr(given)}"
        )
    return count


def describe_budget(manifest: Manifest, engines: Mapping[str, EngineEntry] | None, budget: int) -> list[str]:
    """What of a bundle fits a budget, a line each."""
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
        lines.append("  generating from a context embedding, loaded in turn; subjects must be enrolled elsewhere")
    else:
        lines.append(f"  not at all: no room for {', nor for '.join(too_large)}")
    return lines


def format_bytes(count: int | None) -> str:
    """A size for people; of one that is not known, that."""
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
