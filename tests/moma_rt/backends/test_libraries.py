"""Finding and loading the libraries' Python packages."""

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
