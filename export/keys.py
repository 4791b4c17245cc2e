"""Store keys of exported networks: hashes of everything that determines their content."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from export.checkpoints.architectures import full_config
from export.checkpoints.model import ADAPTERS, NETWORK_ROLES, Component
from moma_rt.bundle.specs import NetworkSpec, Precision

# Entries of a configuration that do not affect what a network computes.
_IGNORED_CONFIG = frozenset(
    """
    architectures bos_token_id dtype eos_token_id force_upcast model_type pad_token_id projection_dim sample_size
    torch_dtype transformers_version
    """.split()
)
# Libraries whose version may change what a network computes, and those that only write its graph.
_LIBRARIES, _GRAPH_LIBRARIES = ("torch", "diffusers", "transformers"), ("onnx", "onnx-ir", "onnxscript")
_OPERATORS = ("injected_self_attention", "context_cross_attention")
# Sources whose change may change what a network computes, and those that only write its graph. Device kernels are in
# neither: `export.attention_kernels` hashes them.
_CODE = (
    *("export/models", "export/checkpoints", "export/geometry.py", "export/networks.py", "export/streaming.py"),
    *("export/tracing.py", "moma_rt/schedulers/tables.py"),
    *(f"kernels/{name}/{part}.py" for name in _OPERATORS for part in ("operator", "reference")),
)
_GRAPH_CODE = (
    *("export/onnx_export.py", "export/lowering.py", "export/network_weights.py", "export/quantize.py"),
    *("export/safetensors_writer.py", "kernels/registration.py", "kernels/operators.py"),
    *(f"kernels/{name}/onnx_function.py" for name in _OPERATORS),
)


def network_key(components: tuple[Component, ...], spec: NetworkSpec, precision: Precision) -> str:
    """Return the key of a network's graph: a hash of its checkpoints, tensors, exporting code and libraries."""
    roles = NETWORK_ROLES[spec.name]
    return _hashed(
        {
            "structure": structure_key(components, spec, precision),
            "sources": {c.role: c.sha256 for c in components if c.role in roles},
            "code": _code_hash(_GRAPH_CODE),
            "libraries": _versions(_GRAPH_LIBRARIES),
        }
    )


def structure_key(components: tuple[Component, ...], spec: NetworkSpec, precision: Precision) -> str:
    """Return the key of what a network computes, apart from its weights' values and the format it is written in."""
    roles = NETWORK_ROLES[spec.name]
    return _hashed(
        {
            "network": spec.to_json(),
            "precision": precision.value,
            "configs": {c.role: _config(c) for c in components if c.role in roles},
            "code": _code_hash(_CODE),
            "libraries": _versions(_LIBRARIES),
        }
    )


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the libraries' versions without build tags such as +cpu."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}


def _config(component: Component) -> dict[str, Any]:
    """Return a component's configuration with its class's defaults, without entries that the network ignores."""
    if component.role == ADAPTERS:
        return component.config
    full = full_config(component.role, component.config, component.name)
    return {name: value for name, value in full.items() if not name.startswith("_") and name not in _IGNORED_CONFIG}


def _hashed(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _code_hash(names: tuple[str, ...]) -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in names:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
