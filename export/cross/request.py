"""Convert a package request to JSON and back, without weights, to pass it to the process that compiles it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from export.checkpoints.model import Checkpoint, Component
from export.networks import NETWORKS
from export.packages import PackageRequest
from moma_rt.bundle.specs import Geometry, Precision

_PARTS = ("unet", "vae", "text_encoder", "adapters", "language", "vision")


def to_json(request: PackageRequest) -> dict[str, Any]:
    """Return everything a package depends on: names, configurations and sizes."""
    checkpoint = request.checkpoint
    parts = {name: getattr(checkpoint, name) for name in _PARTS}
    return {
        "network": request.network.name,
        "geometry": request.geometry.to_json(),
        "precision": request.precision.value,
        "capability": request.capability,
        "is_measured": request.is_measured,
        "base": checkpoint.base,
        "image_size": checkpoint.image_size,
        "roles": sorted(checkpoint.roles),
        "parts": {
            name: {"role": part.role, "name": part.name, "config": part.config, "sha256": part.sha256}
            for name, part in parts.items()
            if part is not None
        },
    }


def from_json(data: dict[str, Any]) -> PackageRequest:
    """Return the request; its checkpoint has no weights."""
    parts = {
        name: Component(**data["parts"][name], load=_refuse_load) if name in data["parts"] else None for name in _PARTS
    }
    checkpoint = Checkpoint(
        base=data["base"],
        image_size=data["image_size"],
        text_tokenizer=None,
        language_tokenizer=None,
        roles=frozenset(data["roles"]),
        **parts,
    )
    return PackageRequest(
        checkpoint,
        NETWORKS[data["network"]],
        Geometry.from_json(data["geometry"]),
        Precision(data["precision"]),
        data["capability"],
        data["is_measured"],
    )


def _refuse_load(names: Iterable[str] | None = None) -> dict[str, Tensor]:
    raise RuntimeError("a package is compiled without weights")
