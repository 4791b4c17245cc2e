"""Bundles with kernels whose PTX is a line of text, for tests of the code that reads kernels."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engines.plugins import FORMAT_VERSION, KernelShape, attention_shapes
from moma_rt.bundle.engines import KernelsEntry
from moma_rt.bundle.manifest import FileEntry, Manifest, NetworkEntry, read_manifest, write_manifest
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision, SelfAttentionLayer, TensorSpec
from moma_rt.files import sha256_file

DTYPES = ("float16", "bfloat16")
# Heads of width 8: TensorRT has no fused attention for them, so without kernels it needs the lowered graph.
GEOMETRY = Geometry(64, 4, 8, 77, 32, 4, 1024, (SelfAttentionLayer("mid_block", 8, 64, 8),), None)
NAMES = ("text_encoder", "denoiser")


def record(shape: KernelShape, dtype: str, capability: int) -> dict[str, Any]:
    """Return an element of kernels.json; its numbers differ between kernels."""
    name = f"{shape.operator.lower()}-{dtype}-{shape.heads}x{shape.width}-{shape.queries}-sm{capability}"
    return {
        "operator": shape.operator,
        "capability": capability,
        "dtype": dtype,
        "heads": shape.heads,
        "width": shape.width,
        "queries": shape.queries,
        "tokens": list(shape.tokens),
        "block_queries": 128 if shape.queries >= 1024 else 48,
        "entry": f"{shape.operator}_kernel",
        "file": f"{name}.ptx",
        "threads": 128 if shape.width < 160 else 256,
        "shared_bytes": 256 * shape.width,
        "registers": 255,
        "spill_bytes": 0,
    }


def write_kernels(folder: Path, shapes: Iterable[KernelShape], dtypes: Iterable[str], capability: int) -> None:
    """Write kernels.json and the files that it names."""
    records = [record(shape, dtype, capability) for shape in shapes for dtype in dtypes]
    for written in records:
        (folder / written["file"]).write_text(f"// {written['file']}\n")
    (folder / "kernels.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "kernels": records}))


def add_kernels(
    root: Path,
    capability: int,
    dtypes: Iterable[str] = DTYPES,
    network: str = "denoiser",
    change: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Add kernels for the bundle's attention layers; `change` edits them before they are hashed. Returns the folder."""
    manifest = read_manifest(root)
    place = f"kernels/{network}_sm{capability}-{'0' * 16}"
    (root / place).mkdir(parents=True)
    write_kernels(root / place, attention_shapes(manifest.geometry), dtypes, capability)
    change(root / place)
    files = {
        f"{place}/{path.name}": FileEntry(sha256_file(path), path.stat().st_size) for path in (root / place).iterdir()
    }
    entry = KernelsEntry(network, capability, "0" * 64, f"{place}/kernels.json")
    changed = dataclasses.replace(manifest, files={**manifest.files, **files}, kernels=(*manifest.kernels, entry))
    write_manifest(root, changed)
    return root / place


def make_bundle(root: Path, *capabilities: int, weights: bytes = b"weights") -> Path:
    """A bundle of two networks whose graphs and weights are a few bytes, with kernels for the capabilities."""
    networks, files = {}, {}
    for name in NAMES:
        key, structure = f"{name}-{weights.hex()}", f"structure of {name}"
        content = {
            f"networks/{name}-{weights.hex():0>16.16}/model.onnx": b"full",
            f"networks/{name}-{weights.hex():0>16.16}/lowered.onnx": b"lowered",
            f"weights/{name}-{weights.hex():0>16.16}/weights.safetensors": weights,
        }
        for file, start in content.items():
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(start + name.encode())
            files[file] = FileEntry(sha256_file(path), path.stat().st_size)
        spec = NetworkSpec(name, (TensorSpec("x", "float32", (3,)),), (TensorSpec("y", "float32", (3,)),))
        onnx, lowered, weights_file = content
        networks[name] = NetworkEntry(spec, Precision.FP16, key, structure, onnx, lowered, (weights_file,))
    write_manifest(root, Manifest("tests", "tests", GEOMETRY, networks, files, ()))
    for capability in capabilities:
        add_kernels(root, capability)
    return root
