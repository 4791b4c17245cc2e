"""The kernels ahead of time: PTX that an assembler takes, within the limits, and the same bytes every time."""

import json
import re

import pytest

from kernels.compile import (
    CROSS,
    DTYPES,
    INDEX_NAME,
    SD15_LAYERS,
    SELF,
    AttentionLayer,
    _without_hidden_parameters,
    compile_kernel,
    main,
    write_kernels,
)
from kernels.launch import PORTABLE_SHARED_BYTES

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
    # Pointers, and in their midst the one number.
    numbers = [index for index, line in enumerate(found) if ".u32" in line]
    assert numbers == ([8] if kernel.operator == SELF else [])
    assert all(".u64" in line for index, line in enumerate(found) if index not in numbers)


@pytest.mark.parametrize("layer", SD15_LAYERS, ids=lambda x: f"{x.operator}-{x.width}x{x.queries}")
def test_every_layer_of_sd15(layer):
    kernel, ptx = compile_kernel(layer, "float16", 90)
    check(kernel, ptx, 90)
    assert ".loc" not in ptx
    assert ".file" not in ptx


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 100, 103, 120, 121])
def test_every_capability(capability):
    for operator, tokens in ((SELF, ()), (CROSS, (77, 4))):
        kernel, ptx = compile_kernel(AttentionLayer(operator, 8, 40, 4096, tokens), "bfloat16", capability)
        check(kernel, ptx, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 120])
def test_all_of_them(capability, tmp_path):
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


def test_a_hidden_parameter_that_is_used_is_noticed():
    ptx = (
        ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{ ld [f_param_0]; ld [f_param_1]; }"
    )
    with pytest.raises(AssertionError, match="f_param_1"):
        _without_hidden_parameters(ptx, 1)
    unused = ptx.replace(" ld [f_param_1];", "")
    assert parameters(_without_hidden_parameters(unused, 1)) == [".param .u64 f_param_0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capabilities", "90,91", "--out", "x"], "no '91'; there are: 80, 86"),
        (["--capabilities", "", "--out", "x"], "no ''; there are: 80, 86"),
        (["--capabilities", "90", "--out", "."], "exists already"),
        (["--capabilities", "90", "--out", "/proc/x/y"], "cannot be written"),
        ([], "--out"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernels.compile.SD15_LAYERS", (AttentionLayer(SELF, 8, 16, 64),))
    assert main(["--capabilities", "89", "--out", str(tmp_path / "made")]) == 0
    assert len(list((tmp_path / "made").glob("*.ptx"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "threads", "shared", "registers", "spilled"]
    assert all(line.endswith("0") for line in lines)
    assert len(lines) == 2
