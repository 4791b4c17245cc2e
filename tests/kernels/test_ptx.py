"""Kernels compiled ahead of time: PTX that an assembler accepts, within the limits, and the same bytes every time."""

import json
import re

import pytest

from kernels.launch import PORTABLE_SHARED_BYTES
from kernels.ptx import (
    CROSS,
    DTYPES,
    INDEX_NAME,
    SD15_LAYERS,
    SELF,
    AttentionLayer,
    CompileError,
    _without_hidden_parameters,
    compile_kernel,
    write_kernels,
)

WIDEST = {SELF: 10, CROSS: 9}


def parameters(ptx: str) -> list[str]:
    listed = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert listed is not None
    return [line.strip() for line in listed[1].split(",\n")]


def check(kernel, ptx, capability):
    assert kernel.shared_bytes <= PORTABLE_SHARED_BYTES
    assert kernel.spill_bytes == 0
    assert 0 < kernel.registers <= 255
    assert f".target sm_{capability}" in ptx
    assert f".reqntid {kernel.threads}\n" in ptx
    assert ptx.count(".visible .entry") == 1
    assert f".visible .entry {kernel.entry}(" in ptx
    found = parameters(ptx)
    assert len(found) == WIDEST[kernel.operator]
    # All are pointers, except for one number among them.
    numbers = [index for index, line in enumerate(found) if ".u32" in line]
    assert numbers == ([8] if kernel.operator == SELF else [])
    assert all(".u64" in line for index, line in enumerate(found) if index not in numbers)


@pytest.mark.parametrize("layer", SD15_LAYERS, ids=lambda x: f"{x.operator}-{x.width}x{x.queries}")
def test_every_layer_of_sd15(layer):
    kernel, ptx = compile_kernel(layer, "float16", 90)
    check(kernel, ptx, 90)
    assert ".loc" not in ptx
    assert ".file" not in ptx


@pytest.mark.parametrize("layer", SD15_LAYERS, ids=lambda x: f"{x.operator}-{x.width}x{x.queries}")
def test_loads_are_ahead_of_the_products(layer):
    """With a pipeline of two stages a loop waits for group 0, which are the loads that it has just issued."""
    _, ptx = compile_kernel(layer, "float16", 80)
    assert max(int(group) for group in re.findall(r"cp\.async\.wait_group\s+(\d+);", ptx)) > 0


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 100, 103, 120, 121])
def test_every_capability(capability):
    for operator, tokens in ((SELF, ()), (CROSS, (77, 4))):
        kernel, ptx = compile_kernel(AttentionLayer(operator, 8, 40, 4096, tokens), "bfloat16", capability)
        check(kernel, ptx, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 120])
def test_every_layer_dtype_and_capability(capability, tmp_path):
    for kernel in write_kernels(tmp_path, SD15_LAYERS, DTYPES, [capability], print):
        check(kernel, (tmp_path / kernel.file).read_text(), capability)


def test_narrow_heads_and_odd_sizes():
    for layer in (AttentionLayer(SELF, 8, 2, 63), AttentionLayer(CROSS, 3, 48, 111, (63, 5))):
        check(*compile_kernel(layer, "float16", 80), 80)


def test_the_index_lists_every_file_once(tmp_path):
    layer = AttentionLayer(SELF, 8, 2, 63)
    said = []
    written = write_kernels(tmp_path, [layer, layer], DTYPES, [80, 86], said.append)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    files = [kernel["file"] for kernel in index["kernels"]]
    assert files == [kernel.file for kernel in written]
    assert sorted(files) == sorted(path.name for path in tmp_path.glob("*.ptx"))
    assert len(set(files)) == len(said) == 4
    assert index["kernels"][0] | {"tokens": []} == index["kernels"][0]


def test_the_same_bytes_every_time(tmp_path, monkeypatch):
    layers = [AttentionLayer(SELF, 8, 16, 64), AttentionLayer(CROSS, 8, 16, 64, (77, 4))]
    for name in ("first", "second"):
        # A cache of its own: nothing of the first run is reused.
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).mkdir()
        write_kernels(tmp_path / name, layers, DTYPES, [90], lambda _: None)
    assert len(list((tmp_path / "cache-second").iterdir())) > 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_what_needs_too_much_shared_memory_is_refused():
    with pytest.raises(CompileError, match="InjectedSelfAttention of width 1024 needs .* bytes of shared memory"):
        compile_kernel(AttentionLayer(SELF, 1, 1024, 256), "float16", 80)


def test_a_compiler_that_fails_says_so_in_a_line(monkeypatch):
    def failing(*_, **__):
        raise TypeError("get_ptxas() takes 0 positional arguments\nbut 1 was given")

    monkeypatch.setattr("triton.compile", failing)
    with pytest.raises(
        CompileError, match=r"Triton .* cannot compile for sm80: get_ptxas\(\) takes 0 positional"
    ) as caught:
        compile_kernel(SD15_LAYERS[0], "float16", 80)
    assert "\n" not in str(caught.value)


def test_a_hidden_parameter_that_is_used_is_noticed():
    ptx = (
        ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{ ld [f_param_0]; ld [f_param_1]; }"
    )
    with pytest.raises(AssertionError, match="f_param_1"):
        _without_hidden_parameters(ptx, 1)
    unused = ptx.replace(" ld [f_param_1];", "")
    assert parameters(_without_hidden_parameters(unused, 1)) == [".param .u64 f_param_0"]
