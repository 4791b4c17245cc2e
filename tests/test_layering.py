"""The direction of imports, read from the sources, so that an import inside a function counts too."""

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
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


# Rooms from the top; those on one line do not import each other. CONTRIBUTING.md says what each is for.
ROOMS: Mapping[str, tuple[set[str], ...]] = {
    "moma_rt": (
        {"__main__"},
        {"cli"},
        {"runtime", "inspection", "outputs"},
        {"pipeline"},
        {"memory"},
        {"subject"},
        {"backends"},
        {"bundle", "inputs", "schedulers"},
        {"files"},
        {"messages", "timing", "finite", "lazy"},
        {"errors"},
    ),
    "benchmarks": (
        {"gpu", "quality"},
        {"latency", "kernels", "soak", "builds"},
        {"report", "timer", "picture_difference"},
        {"environment", "memory", "plot"},
    ),
}
MAX_LINES = 350


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


def modules(repository: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Every module of some packages by its dotted name."""
    files = [path for package in packages for path in (repository / package).rglob("*.py")]
    names = [".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True))


def import_graph(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """For each module, those of `found` that it imports."""
    graph: dict[str, set[str]] = {}
    for name, path in found.items():
        targets = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {name if name in found else node.module for name in full}
        graph[name] = (targets & found.keys()) - {name}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one import cycle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def wrong_rooms(package: str, graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that do not point to a lower room, and modules in no room."""
    level = {room: depth for depth, rooms in enumerate(ROOMS[package]) for room in rooms}
    wrong = []
    for name, targets in sorted(graph.items()):
        room = name.split(".")[1] if "." in name else ""
        # The package itself names what is public, and imports it on first use.
        if not room:
            continue
        if room not in level:
            wrong.append(f"{name} is in no room of {package}: add it to ROOMS")
            continue
        for target in sorted(targets):
            below = target.split(".")[1] if "." in target else ""
            if below and below != room and level.get(below, -1) <= level[room]:
                wrong.append(f"{name} imports {target}")
    return wrong


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_no_import_runs_upwards(repository: Path, package: str):
    assert wrong_rooms(package, import_graph(modules(repository, [package]))) == []


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"moma_rt.errors": {"moma_rt.messages"}}, "moma_rt.errors imports moma_rt.messages"),
        ({"moma_rt.bundle.specs": {"moma_rt.inputs.images"}}, "moma_rt.bundle.specs imports moma_rt.inputs.images"),
        ({"moma_rt.attic": set()}, "moma_rt.attic is in no room of moma_rt: add it to ROOMS"),
        ({"moma_rt.runtime": {"moma_rt.attic"}}, "moma_rt.runtime imports moma_rt.attic"),
    ],
)
def test_an_import_that_runs_upwards_is_named(graph: dict[str, set[str]], message: str):
    assert wrong_rooms("moma_rt", graph) == [message]


def test_there_is_no_import_cycle(repository: Path):
    assert cycle(import_graph(modules(repository, PACKAGES - {"tests", "examples"}))) == []


def test_a_cycle_is_found(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").touch()
    (tmp_path / "a" / "b.py").write_text("def f():\n    from a.c import g\n")
    (tmp_path / "a" / "c.py").write_text("from a import b\n")
    assert set(cycle(import_graph(modules(tmp_path, ["a"])))) == {"a.b", "a.c"}


def test_files_are_short(repository: Path):
    lines = {
        name: len(path.read_text().splitlines())
        for name, path in modules(repository, PACKAGES - {"tests", "examples"}).items()
    }
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


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
