"""Names of what a build makes: hashes of everything that determines it."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from export.checkpoints.architectures import full_config
from export.checkpoints.model import ADAPTERS, NETWORK_ROLES, Component
from moma_rt.specs import NetworkSpec, Precision

# Of a configuration: where it comes from and how its weights are stored.
_NO_STRUCTURE = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
# Libraries whose version may change a graph.
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
_OPERATORS = ("injected_self_attention", "context_cross_attention")
# Sources whose change may change a graph.
_CODE = (
    *("export/models", "export/checkpoints", "export/geometry.py", "export/networks.py", "export/onnx_export.py"),
    *("export/lowering.py", "export/network_weights.py", "export/quantize.py", "export/safetensors_writer.py"),
    *("export/streaming.py", "export/tracing.py"),
    *("kernels/registration.py", "kernels/operators.py", "moma_rt/schedules.py"),
    # What computes on a device is no part of a graph.
    *(f"kernels/{name}/{part}.py" for name in _OPERATORS for part in ("operator", "reference", "onnx_function")),
)


def network_key(components: tuple[Component, ...], spec: NetworkSpec, precision: Precision) -> str:
    """Names what a network computes: its sources, its tensors, the code that traces it, the libraries it runs on."""
    roles = NETWORK_ROLES[spec.name]
    sources = {c.role: c.sha256 for c in components if c.role in roles}
    return _hashed({"structure": structure_key(components, spec, precision), "sources": sources})


def structure_key(components: tuple[Component, ...], spec: NetworkSpec, precision: Precision) -> str:
    """Names what a network computes but for the values of its weights."""
    roles = NETWORK_ROLES[spec.name]
    return _hashed(
        {
            "network": spec.to_json(),
            "precision": precision.value,
            "configs": {c.role: _config(c) for c in components if c.role in roles},
            "code": _code_hash(),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )


def _config(component: Component) -> dict[str, Any]:
    """A component's configuration with its class's defaults, and without what a computation does not depend on."""
    if component.role == ADAPTERS:
        return component.config
    full = full_config(component.role, component.config, component.name)
    return {name: value for name, value in full.items() if not name.startswith("_") and name not in _NO_STRUCTURE}


def _hashed(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _code_hash() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in _CODE:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
