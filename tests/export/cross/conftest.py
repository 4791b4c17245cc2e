"""The toolchains that the tests of cross-compiling need."""

from pathlib import Path

import pytest
import torch
import triton.backends.nvidia

from export.cross.stubs import Toolchain


@pytest.fixture
def triton_tools(tmp_path: Path) -> Toolchain:
    """Compilers and the CUDA headers in Triton: enough for the stubs, but not for a package."""
    home = tmp_path / "cuda"
    home.mkdir()
    (home / "include").symlink_to(Path(triton.backends.nvidia.__path__[0]) / "include")
    return Toolchain("cc", "g++", home)


@pytest.fixture(scope="session")
def cuda_build() -> None:
    """Skip the test unless PyTorch is a build with CUDA."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch is a build for CPUs here; compiling for a GPU takes PyPI's own, with CUDA")
