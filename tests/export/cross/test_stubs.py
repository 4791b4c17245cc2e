import json
import os
import platform
import subprocess
import sys

import pytest

from export.cross import stubs
from export.cross.devices import DEVICES
from export.cross.stubs import Toolchain, build_stubs, check_host
from export.host_compiler import portable_compiler
from moma_rt.errors import BundleError, InputError

ASK = """
import ctypes, json, sys
from moma_rt.backends.device import local_device
runtime = ctypes.CDLL(None)
count = ctypes.c_int()
assert runtime.cudaGetDeviceCount(ctypes.byref(count)) == 0
memory = ctypes.c_void_p()
assert runtime.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(1 << 40)) == 0, "memory that nothing writes to"
text = b"copied there and back"
back = ctypes.create_string_buffer(len(text))
for to, source in ((memory, text), (back, memory)):
    assert runtime.cudaMemcpyAsync(to, source, ctypes.c_size_t(len(text)), 0, None) == 0
assert back.raw == text
assert runtime.cudaFree(memory) == 0
device = local_device()
print(json.dumps([device.name, device.capability, count.value]))
"""


@pytest.mark.parametrize("capability", [87, 120])
def test_a_process_finds_the_device(tmp_path, triton_tools, capability):
    """The runtime's own query goes to the stub of the driver, which the dynamic linker finds."""
    facts = DEVICES[capability]
    environment = build_stubs(facts, triton_tools, tmp_path)
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [facts.name, capability, 1]


def test_nothing_of_this_machine_is_in_the_environment(tmp_path, triton_tools, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    environment = build_stubs(DEVICES[90], triton_tools, tmp_path)
    assert "CUDA_VISIBLE_DEVICES" not in environment, "it would hide the device"
    assert environment["LD_LIBRARY_PATH"] == f"{tmp_path}{os.pathsep}/somewhere"
    assert environment["CUDA_HOME"] == str(triton_tools.cuda_home)


def test_packages_have_no_instructions_of_this_cpu(tmp_path, triton_tools, monkeypatch):
    (tmp_path / "stubs").mkdir()
    monkeypatch.setenv("CXX", build_stubs(DEVICES[90], triton_tools, tmp_path / "stubs")["CXX"])
    compiler = portable_compiler(tmp_path)

    def macros(*command):
        done = subprocess.run([*command, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, check=True)
        return sorted(done.stdout.splitlines())

    assert macros(compiler, "-march=native", "-DA='a b'") == macros("g++", "-DA='a b'")


def test_a_stub_that_cannot_be_compiled_is_one_line(tmp_path, triton_tools):
    (triton_tools.cuda_home / "include").unlink()
    with pytest.raises(BundleError) as caught:
        build_stubs(DEVICES[90], triton_tools, tmp_path)
    assert str(caught.value).startswith("driver.c cannot be compiled: ")
    assert "cuda.h" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cc", "g++"])
def test_no_compiler(monkeypatch, missing):
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None if name == missing else f"/bin/{name}")
    with pytest.raises(InputError) as caught:
        Toolchain.find("inductor sm90", "13.0")
    assert str(caught.value) == f"inductor sm90: no C++ compiler: {missing} is not on the path; install g++"


def headers(home, version, *, left_out=()):
    for name in stubs._HEADERS:
        path = home / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in left_out:
            path.write_text(f"#define CUDA_VERSION {version}\n" if name == "cuda.h" else "")
    return home


@pytest.fixture
def homes(monkeypatch):
    """The folders in which headers are looked for."""
    found = []
    monkeypatch.setattr(stubs, "_cuda_homes", lambda major: iter(found))
    monkeypatch.setattr(stubs.shutil, "which", lambda name: f"/bin/{name}")
    return found


def test_the_headers_of_pytorchs_cuda_are_taken(tmp_path, homes):
    homes += [headers(tmp_path / "a", 12080), headers(tmp_path / "b", 13000, left_out=["nv/target"]), tmp_path / "c"]
    homes += [headers(tmp_path / "d", 13020), headers(tmp_path / "e", 13000)]
    assert Toolchain.find("inductor sm90", "13.0") == Toolchain("/bin/cc", "/bin/g++", tmp_path / "d")


@pytest.mark.parametrize("left_out", [["cuda.h"], ["crt/host_defines.h"], ["nv/target"]])
def test_no_headers(tmp_path, homes, left_out):
    homes += [headers(tmp_path, 13000, left_out=left_out)]
    with pytest.raises(InputError) as caught:
        Toolchain.find("inductor sm90", "13.0")
    said = str(caught.value)
    assert said.startswith("inductor sm90: no CUDA headers of version 13: set CUDA_HOME to a CUDA toolkit")
    assert "pip install 'nvidia-cuda-crt~=13.0' 'nvidia-cuda-cccl~=13.0'" in said


def test_a_named_toolkit_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert next(stubs._cuda_homes(13)) == tmp_path / "named"


def test_hosts(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    check_host(DEVICES[90], "inductor sm90")
    with pytest.raises(
        InputError, match="inductor sm87: hosts of such a device are aarch64, and this machine is x86_64: build on"
    ):
        check_host(DEVICES[87], "inductor sm87")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_host(DEVICES[87], "inductor sm87")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(InputError, match="on Linux only"):
        check_host(DEVICES[90], "inductor sm90")
