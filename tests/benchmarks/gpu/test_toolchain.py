"""Finding CUDA's headers and the driver's library."""

import pytest

from benchmarks.gpu import toolchain as module
from benchmarks.gpu.toolchain import toolchain


@pytest.fixture
def cuda(tmp_path):
    """A folder with CUDA's headers, and a driver's library."""
    home = tmp_path / "cuda-13.0"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda.h").touch()
    library = tmp_path / "libcuda.so.1"
    library.touch()
    return home, library


def test_cuda_home_is_used_if_it_has_headers(cuda, tmp_path, monkeypatch):
    home, library = cuda
    monkeypatch.setattr(module, "_driver_library", lambda: library)
    found = toolchain(tmp_path / "lib", {"CUDA_HOME": str(home), "LIBRARY_PATH": "/there"})
    assert found == {"CUDA_HOME": str(home), "LIBRARY_PATH": f"{tmp_path / 'lib'}:/there"}
    assert (tmp_path / "lib" / "libcuda.so").resolve() == library
    # Again, over the existing link.
    assert toolchain(tmp_path / "lib", {"CUDA_HOME": str(home)})["LIBRARY_PATH"] == str(tmp_path / "lib")


def test_a_link_to_nvcc_leads_to_its_toolkit(cuda, tmp_path, monkeypatch):
    home, _ = cuda
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (home / "bin" / "nvcc").chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setattr(module, "_driver_library", lambda: None)
    # A CUDA_HOME without headers is skipped.
    assert toolchain(tmp_path / "lib", {"CUDA_HOME": "/nowhere", "PATH": str(tools)}) == {"CUDA_HOME": str(home)}
    assert not (tmp_path / "lib").exists()


def test_the_driver_is_found_in_the_linkers_cache(tmp_path, monkeypatch):
    ldconfig = tmp_path / "ldconfig"
    library = tmp_path / "libcuda.so.1"
    library.touch()
    lines = [
        "\tlibcuda.so.1 (libc6) => /lib32/libcuda.so.1",
        "\tlibcudart.so.1 (libc6,x86-64) => /x/libcudart.so.1",
        f"\tlibcuda.so.1 (libc6,x86-64) => {library}",
    ]
    ldconfig.write_text("#!/bin/sh\ncat <<'X'\n" + "\n".join(lines) + "\nX\n")
    ldconfig.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(ldconfig))
    assert module._driver_library() == library
    library.unlink()
    assert module._driver_library() is None
