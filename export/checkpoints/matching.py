"""Match a file's tensors strictly to the names and shapes that a network expects."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from export.checkpoints.model import Component, StateDict
from export.checkpoints.names import Rename
from export.checkpoints.values import check_floating
from export.checkpoints.weights import Weights
from moma_rt.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
_LISTED = 4
_CLASS_PREFIXES = ("text_model.", "vision_model.")


@dataclass(frozen=True)
class Origin:
    """Where a component comes from: its name for the manifest, its config, and the hash of its content."""

    name: str
    config: dict[str, Any]
    sha256: str


def fit(role: str, origin: Origin, weights: Weights, expected: Shapes, rename: Rename, check: bool = True) -> Component:
    """Return the component whose tensors are `weights` under new names; `rename` returns None for tensors to leave out.

    `rename` returns names without the prefix that some versions of the libraries put before all of a class's tensors;
    they get the prefix that `expected` has. `check` reads all values now; the component's `load` checks them as well.

    Raises:
        CheckpointError: tensors are missing, unexpected, named twice, or of another shape (the message lists them), or
            have integers, NaN or infinity.
    """
    stored: dict[str, str] = {}
    prefix = class_prefix(expected)
    for name in weights.shapes:
        new = rename(name)
        new = new if new is None else prefix + new
        if new in stored:
            raise CheckpointError(f"{weights.location} has {new} twice, as {stored[new]} and as {name}")
        if new is not None:
            stored[new] = name
    report_mismatch(str(weights.location), {new: weights.shapes[old] for new, old in stored.items()}, expected)

    if check:
        weights.check(stored.values())

    def load(names: Iterable[str] | None = None) -> StateDict:
        wanted = stored if names is None else {name: stored[name] for name in names}
        tensors = weights.read(wanted.values())
        check_floating(tensors, weights.location)
        return {new: tensors[old].reshape(expected[new]) for new, old in wanted.items()}

    return Component(role, origin.name, origin.config, origin.sha256, load)


def unread(role: str, name: str, config: dict[str, Any]) -> Component:
    """Return a component that has only its config, because its weights are not needed."""

    def refuse(names: Iterable[str] | None = None) -> StateDict:
        raise CheckpointError(f"the weights of the {role} were not asked for")

    return Component(role, name, config, "", refuse)


def class_prefix(expected: Shapes) -> str:
    """Return the prefix, if any, that the installed transformers puts before all tensor names of a CLIP half."""
    return next((p for p in _CLASS_PREFIXES if all(name.startswith(p) for name in expected)), "")


def report_mismatch(what: str, found: Shapes, expected: Shapes) -> None:
    """Compare names and shapes; a trailing 1×1 is no difference: linear layers and convolutions are stored as either.

    Raises:
        CheckpointError: they differ; the message lists how.
    """
    faults = []
    if missing := expected.keys() - found.keys():
        faults.append(f"missing {_listed(missing)}")
    if unexpected := found.keys() - expected.keys():
        faults.append(f"unexpected {_listed(unexpected)}")
    common = (name for name in expected if name in found)
    shapes = [
        f"{name} is {list(found[name])} instead of {list(expected[name])}"
        for name in common
        if plain(found[name]) != plain(expected[name])
    ]
    if shapes:
        faults.append(_listed(shapes))
    if faults:
        raise CheckpointError(f"{what} does not fit: {'; '.join(faults)}")


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a trailing 1×1."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _listed(names: Any) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
