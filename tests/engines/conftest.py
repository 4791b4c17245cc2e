"""TensorRT's official Python bindings, made importable in a subprocess where TensorRT is not installed.

The bindings are an extension module linked against TensorRT's libraries, which a wheel of bindings does not hold. With
a stub of those libraries they can be imported, and show which classes, attributes and enum members a release has.
With TensorRT-RTX's libraries, whose interface is nearly that of TensorRT 11, they also parse and build.
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
WHEELS = REPOSITORY / "build" / "tensorrt-bindings"
PINNED = tuple(
    Requirement(line)
    for line in (Path(__file__).parent / "tensorrt_bindings.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
PLUGINS_SINCE = Version("10.9")
INSTALLED = ("tensorrt", "tensorrt_rtx")
# The content of the package `tensorrt`, which is published as an installer and not as a wheel.
PACKAGE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
PLUGIN_PACKAGE = "from tensorrt_bindings.plugin import *\n"
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
# Every symbol that the bindings import: the loader resolves all of them when Python imports the module.
STUB = "\n".join(
    f"void *{symbol}(void) {{ return 0; }}"
    for symbol in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)
# TensorRT-RTX has no plugin library; true means that the plugins were registered.
PLUGIN_STUB = "_Bool initLibNvInferPlugins(void *logger, const char *plugin_namespace) { return 1; }"
# The driver functions that moma_rt/backends/device.py calls, for a fake GPU of capability 9.0. They also hide a real
# GPU, for which TensorRT-RTX would build another engine.
DRIVER_STUB = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDeviceGetName(char *name, int bytes, int device) { __builtin_strncpy(name, "Stub", bytes); return 0; }
"""


@dataclass(frozen=True)
class Bindings:
    """A `tensorrt` or `tensorrt_rtx` that a Python started with `environment` can import."""

    version: str
    module: str
    environment: dict[str, str]

    def run(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Start Python with `arguments`, in the repository's root, and wait."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=REPOSITORY,
            env={**os.environ, **self.environment},
        )


def _version(requirement: Requirement) -> Version:
    (clause,) = requirement.specifier
    return Version(clause.version)


def _find_wheel(requirement: Requirement) -> Path:
    supported = frozenset(sys_tags())
    for path in WHEELS.glob("*.whl"):
        name, version, _, tags = parse_wheel_filename(path.name)
        if name == canonicalize_name(requirement.name) and version in requirement.specifier and tags & supported:
            return path
    return pytest.skip(f"no wheel of {requirement} for this Python in build/tensorrt-bindings; make test fetches it")


def _compile(source: str, library: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, cc")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)


def _unpack(requirement: Requirement, folder: Path) -> Bindings:
    """Unpack the wheel of `requirement` beside an empty folder for the libraries, `folder`/lib."""
    with zipfile.ZipFile(_find_wheel(requirement)) as wheel:
        wheel.extractall(folder)
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(PACKAGE)
    if (folder / "tensorrt_bindings" / "plugin").is_dir():
        (folder / "tensorrt" / "plugin").mkdir()
        (folder / "tensorrt" / "plugin" / "__init__.py").write_text(PLUGIN_PACKAGE)
    # Where TensorRT is installed, this package would load its libraries in place of ours.
    (folder / "tensorrt_libs.py").touch()
    (folder / "lib").mkdir()
    environment = {"LD_LIBRARY_PATH": str(folder / "lib"), "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    return Bindings(str(_version(requirement)), "tensorrt", environment)


def _over_stub(requirement: Requirement, folder: Path) -> Bindings:
    bindings = _unpack(requirement, folder)
    library = folder / "lib" / "stub.so"
    _compile(STUB, library)
    for name in LIBRARIES:
        (folder / "lib" / f"{name}.so.{Version(bindings.version).major}").symlink_to(library)
    return bindings


def _installed(module: str) -> Bindings:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    return Bindings(importlib.metadata.version(module), module, {})


@pytest.fixture(scope="session")
def load_bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Requirement | str], Bindings]:
    """Makes a pinned release or an installed module importable, once; skips the test where it is missing."""

    @functools.cache
    def load(source: Requirement | str) -> Bindings:
        return (
            _installed(source) if isinstance(source, str) else _over_stub(source, tmp_path_factory.mktemp("bindings"))
        )

    return load


@pytest.fixture(params=[*PINNED, *INSTALLED], ids=str)
def bindings(request: pytest.FixtureRequest, load_bindings: Callable[[Requirement | str], Bindings]) -> Bindings:
    """Each pinned release over the stub, then what is installed here."""
    return load_bindings(request.param)


@pytest.fixture(params=[r for r in PINNED if _version(r) >= PLUGINS_SINCE], ids=str)
def plugin_bindings(request: pytest.FixtureRequest, load_bindings: Callable[[Requirement | str], Bindings]) -> Bindings:
    """Each pinned release that has `tensorrt.plugin`, over the stub."""
    return load_bindings(request.param)


@pytest.fixture
def every_bindings(load_bindings: Callable[[Requirement | str], Bindings]) -> list[Bindings]:
    """All pinned releases, and TensorRT-RTX."""
    return [load_bindings(source) for source in (*PINNED, "tensorrt_rtx")]


@pytest.fixture(scope="session")
def bindings_over_rtx(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The newest pinned release over TensorRT-RTX's libraries, and over a driver that names a GPU of capability 9.0.

    The two interfaces differ slightly, so some methods call another one or crash, such as the network's `name`, `flags`
    and `add_plugin`, the builder's `build_serialized_network_to_stream` and `build_engine_with_config`, and a tensor's
    `is_shape_tensor`. REFIT, STRIP_PLAN and VERSION_COMPATIBLE fail as they do in TensorRT-RTX.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tensorrt_rtx is not installed")
    libraries = Path(found.submodule_search_locations[0])
    folder = tmp_path_factory.mktemp("bindings-over-rtx")
    bindings = _unpack(max(PINNED, key=_version), folder)
    major = Version(bindings.version).major
    for name, pattern in (("libnvinfer", "libtensorrt_rtx.so.*"), ("libnvonnxparser", "libtensorrt_onnxparser*.so.*")):
        (target,) = libraries.glob(pattern)
        (folder / "lib" / f"{name}.so.{major}").symlink_to(target)
    _compile(PLUGIN_STUB, folder / "lib" / f"libnvinfer_plugin.so.{major}")
    _compile(DRIVER_STUB, folder / "lib" / "libcuda.so.1")
    return bindings
