"""Finding and loading the libraries' Python packages."""

import os
import subprocess
import sys

import pytest

from moma_rt.backends.libraries import (
    has_cuda_provider,
    is_installed,
    library,
    library_log,
    library_version,
    onnx_runtime,
)
from moma_rt.bundle.engines import Flavour
from moma_rt.errors import InputError
from tests.moma_rt.fake_gpu import FakeGpu


def test_a_module_is_installed_or_not():
    assert is_installed("json.decoder")
    assert not is_installed("json.painter")
    assert not is_installed("no_such_package.of_this.name")


def test_looking_for_a_library_imports_nothing(repository):
    code = (
        "import sys; from moma_rt.backends.selection import Host; Host().missing;"
        "print(sorted({'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'cuda.bindings', 'numpy'} & sys.modules.keys()))"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=repository)
    assert found in ("[]\n", "['cuda.bindings']\n")


def test_the_cuda_provider_of_this_onnx_runtime_and_of_none(monkeypatch):
    providers = onnx_runtime().get_available_providers()
    assert has_cuda_provider() == ("CUDAExecutionProvider" in providers)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not has_cuda_provider()


def test_a_library_whose_own_libraries_are_missing(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open\\n  shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(InputError) as caught:
        library(Flavour.TENSORRT)
    assert str(caught.value) == (
        "the Python package tensorrt cannot be loaded: libnvinfer.so.10: cannot open shared object file"
    )


def test_the_log_keeps_the_first_error_and_memory_sizes(monkeypatch):
    gpu = FakeGpu.install(monkeypatch, {})
    severity, log = gpu.trt.ILogger.Severity, library_log(Flavour.TENSORRT)
    assert library_version(Flavour.TENSORRT) == "11.4.0"
    assert library_log(Flavour.TENSORRT) is log
    log.log(severity.WARNING, "a warning")
    log.log(severity.ERROR, "the first\n  of them")
    log.log(severity.ERROR, "the second")
    log.log(severity.INFO, "Total Activation Memory: 4096 bytes")
    assert (log.error, log.memory) == ("the first of them", {"Activation": 4096})
    log.begin()
    assert (log.error, log.memory) == ("", {})


FAKE_ONNX_RUNTIME = """
import os
class InferenceSession: ...
seen = os.environ.get("ORT_DISABLE_TELEMETRY")
"""
IMPORT = (
    "import os; from moma_rt.backends.libraries import onnx_runtime;"
    "print(onnx_runtime().seen, os.environ.get('ORT_DISABLE_TELEMETRY'))"
)


@pytest.mark.parametrize(
    ("given", "code", "seen"),
    [
        (None, IMPORT, "1 None"),
        ("0", IMPORT, "0 0"),
        ("1", IMPORT, "1 1"),
        (None, f"import onnxruntime; {IMPORT}", "None None"),
    ],
)
def test_onnx_runtime_is_imported_without_telemetry_unless_the_user_decides(tmp_path, repository, given, code, seen):
    """The variable is set for the import only: a program that embeds the runtime keeps its environment."""
    (tmp_path / "onnxruntime.py").write_text(FAKE_ONNX_RUNTIME)
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{repository}"
    environment |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, env=environment)
    assert found.strip() == seen


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of another system")
@pytest.mark.parametrize("writable", [True, False])
def test_a_session_writes_nothing_into_the_home_folder_and_nothing_on_stderr(tmp_path, repository, writable):
    code = (
        "import sys; from moma_rt.backends import create; from moma_rt.bundle.specs import NetworkSpec;"
        "from pathlib import Path; from tests.moma_rt.backends.networks import STEP, save_graph;"
        "create('onnxruntime').load(STEP, save_graph(Path(sys.argv[1]) / 'step.onnx', STEP))"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    environment["HOME"] = str(home if writable else "/proc/no/home")
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(home.rglob("*")) == []
