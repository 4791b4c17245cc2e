"""What `import moma_rt` offers and what it loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moma_rt

HEAVY = {"torch", "onnxruntime", "PIL", "numpy", "tokenizers", "safetensors", "transformers", "diffusers", "tensorrt"}


def modules_after(code: str, repository: Path) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import moma_rt", "import moma_rt.cli", "import moma_rt; dir(moma_rt)"])
def test_import_loads_nothing_heavy(code: str, repository: Path):
    loaded = modules_after(code, repository)
    assert "moma_rt" in loaded
    assert loaded & HEAVY == set()


def test_every_public_name_can_be_imported():
    for name in moma_rt.__all__:
        assert getattr(moma_rt, name) is not None
        assert name in dir(moma_rt)
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        _ = moma_rt.Painter


def test_public_names_and_the_default_backend_arrive_without_torch(repository: Path):
    code = (
        "import moma_rt; assert all(isinstance(o, type) for o in (moma_rt.Runtime, moma_rt.Subject, moma_rt.Result))\n"
        "import moma_rt.backends.onnxruntime, moma_rt.backends.selection"
    )
    loaded = modules_after(code, repository)
    assert loaded & {"torch", "transformers", "diffusers", "onnx", "export", "engines", "kernels"} == set()
