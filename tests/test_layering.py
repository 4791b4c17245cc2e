"""The direction of imports, read from the sources, so that an import inside a function counts too."""

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = {"moma_rt", "kernels", "engines", "export", "benchmarks", "tests", "examples"}
MODEL_LIBRARIES = {"torch", "torchvision", "transformers", "diffusers", "accelerate", "onnx", "onnxscript", "triton"}
FORBIDDEN = {
    "moma_rt": (PACKAGES - {"moma_rt"}) | MODEL_LIBRARIES,
    "kernels": (PACKAGES - {"kernels"}) | {"transformers", "diffusers"},
    # Engines are built on the target machine, where neither torch nor Triton need be installed.
    "engines": (PACKAGES - {"engines", "moma_rt", "kernels"}) | (MODEL_LIBRARIES - {"onnx"}),
    "export": PACKAGES - {"export", "engines", "kernels", "moma_rt"},
}
# The inductor backend exists to run torch; nothing imports it unless it is asked for.
TORCH_ALLOWED = {"moma_rt/backends/inductor.py", "moma_rt/backends/package_weights.py"}


def imported(source: str) -> set[tuple[int, str]]:
    """Line and top-level module of every absolute import, conditional and function-level ones included."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name.partition(".")[0]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found.add((node.lineno, node.module.partition(".")[0]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add((node.lineno, node.args[0].value.partition(".")[0]))
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_down(repository: Path, package: str):
    wrong = []
    for path in sorted((repository / package).rglob("*.py")):
        name = path.relative_to(repository).as_posix()
        forbidden = FORBIDDEN[package] - ({"torch"} if name in TORCH_ALLOWED else set())
        wrong += [f"{name}:{line}: {module}" for line, module in imported(path.read_text()) if module in forbidden]
    assert wrong == []


def test_tensorrt_plugins_need_only_tensorrt_and_numpy(repository: Path):
    for path in (repository / "kernels").rglob("tensorrt_plugin.py"):
        assert {module for _, module in imported(path.read_text())} & (MODEL_LIBRARIES | PACKAGES) == set(), path


def test_wheels_hold_the_plugins_and_not_the_package_kernels(repository: Path):
    """That name is Hugging Face's too: an __init__.py of ours in its folder would take the place of theirs."""
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = set(setuptools.find_namespace_packages(str(repository), **settings))
    plugins = {path.parent.name for path in (repository / "kernels").glob("*/tensorrt_plugin.py")}
    assert len(plugins) == 2
    assert {name for name in found if name.startswith("kernels")} == {f"kernels.{name}" for name in plugins}
    assert {"moma_rt", "moma_rt.backends", "engines"} <= found
    for name in plugins:
        assert imported((repository / "kernels" / name / "__init__.py").read_text()) == set(), "it is read on a target"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch.nn as nn", "torch"),
        ("from torch.nn import functional", "torch"),
        ("def f():\n    import torch", "torch"),
        ("try:\n    import a, torch\nexcept ImportError:\n    pass", "torch"),
        ("importlib.import_module('torch.fx')", "torch"),
    ],
)
def test_the_scan_sees_every_kind_of_import(source: str, module: str):
    assert module in {name for _, name in imported(source)}


def test_relative_imports_are_not_mistaken_for_packages():
    assert imported("from .torch import x\nfrom . import kernels") == set()


def test_hugging_face_does_not_take_our_kernels_for_its_own():
    # Its optional package is named `kernels` too, and is found by that name.
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    assert not import_utils.is_kernels_available()
