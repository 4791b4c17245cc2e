"""The networks of `networks.py` as PyTorch modules and as inductor packages."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache

from export.packages import PackageOptions, add_to_package
from moma_rt.backends.inductor import TENSORS_NOTE, tensors_note
from moma_rt.bundle.specs import NetworkSpec
from tests.moma_rt.backends.networks import STEP

ROWS, OLD, NEW = (torch.export.Dim(name, max=most) for name, most in (("rows", 1 << 20), ("old", 9), ("new", 9)))


class Step(torch.nn.Module):
    """`networks.step`."""

    example = (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32), torch.ones(1))
    sizes = ({0: ROWS}, {0: ROWS}, {})

    def forward(self, x, ids, y):
        return x + ids + y, ids.to(torch.uint8)


class Past(torch.nn.Module):
    """`networks.past`."""

    example = (torch.ones(2, 3), torch.ones(2, 4))
    sizes = ({1: OLD}, {1: NEW})

    def forward(self, past, new):
        return 2 * new, torch.cat([past, new], 1).sum().reshape(1, 1)


def save_package(path: Path, spec: NetworkSpec, device: str = "cpu") -> Path:
    """Compile `STEP` or `PAST` for a device."""
    module = Step() if spec is STEP else Past()
    example = tuple(tensor.to(device) for tensor in module.example)
    program = torch.export.export(module, example, dynamic_shapes=module.sizes)
    options = PackageOptions.of(spec.name, 0 if device == "cpu" else 90)
    settings = {**options.settings, "aot_inductor.metadata": {TENSORS_NOTE: tensors_note(spec)}}
    with fresh_cache():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    add_to_package(path, module.state_dict(), program.constants, options)
    return path


def with_notes(package: Path, path: Path, **notes: str | None) -> Path:
    """Write a copy of a package with other metadata; None removes an entry."""

    def change(content: bytes) -> bytes:
        said = {**json.loads(content), **notes}
        return json.dumps({key: value for key, value in said.items() if value is not None}).encode()

    return _changed(package, path, "_metadata.json", change)


def with_code(package: Path, path: Path, code: bytes | None) -> Path:
    """Write a copy of a package with other code; None removes it."""
    return _changed(package, path, ".so", lambda _: code)


def _changed(package: Path, path: Path, suffix: str, change: Callable[[bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            changed = change(content) if item.filename.endswith(suffix) else content
            if changed is not None:
                target.writestr(item, changed)
    return path
