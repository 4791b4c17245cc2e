import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["Runtime", "Subject", "Result"])
def test_public_names_arrive_without_torch(name: str, repository: Path):
    loaded = modules_after(f"import moma_rt; assert isinstance(moma_rt.{name}, type)", repository)
    assert loaded & {"torch", "transformers", "diffusers", "export", "engines", "kernels"} == set()
