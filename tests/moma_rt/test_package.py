"""What `import moma_rt` offers and what it costs."""

import subprocess
import sys

import pytest

import moma_rt


def test_every_public_name_can_be_imported():
    for name in moma_rt.__all__:
        assert getattr(moma_rt, name) is not None
        assert name in dir(moma_rt)
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        _ = moma_rt.Painter


def test_importing_loads_no_library_and_running_loads_no_torch(repository):
    code = (
        "import sys, moma_rt;"
        "print(sorted({'numpy', 'PIL', 'onnxruntime', 'tokenizers', 'torch'} & sys.modules.keys()));"
        "from moma_rt import Runtime; import moma_rt.backends.onnxruntime;"
        "print(sorted({'torch', 'onnx', 'export', 'kernels', 'engines'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=repository) == "[]\n[]\n"
