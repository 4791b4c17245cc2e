"""Compiles the Triton kernels to PTX ahead of time, without a GPU.

A PTX file is for one compute capability; the driver of such a device compiles it to machine code. `kernels.json` beside
it holds the launch parameters, so a launch needs neither Triton nor PyTorch. The same sources and Triton version give
the same bytes.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from kernels.context_cross_attention.triton_kernel import context_cross_attention_kernel
from kernels.injected_self_attention.triton_kernel import injected_self_attention_kernel
from kernels.launch import (
    PORTABLE_SHARED_BYTES,
    AttentionShape,
    LaunchConfig,
    cross_attention_launch,
    self_attention_launch,
    split_width,
)

INDEX_NAME = "kernels.json"
FORMAT_VERSION = 1
SELF, CROSS = "InjectedSelfAttention", "ContextCrossAttention"
# The oldest PTX version that supports the capability, for the oldest drivers: 8.0 is CUDA 12.0's, 8.7 CUDA 12.8's.
_PTX_VERSIONS = MappingProxyType({100: 86, 103: 88, 120: 87, 121: 88})
_OLDEST_PTX = 80
_TRITON_DTYPES = MappingProxyType({"float16": "fp16", "bfloat16": "bf16"})
DTYPES = tuple(_TRITON_DTYPES)
_ELEMENT_BYTES = 2


class CompileError(Exception):
    """This Triton cannot compile a kernel for a device, or not within a launch's limits. The message is one line."""


@dataclass(frozen=True)
class AttentionLayer:
    """The sizes that a kernel is compiled for; batch, guidance halves and reference tokens stay dynamic.

    `tokens`: text and context tokens of ContextCrossAttention; empty for InjectedSelfAttention.
    """

    operator: str
    heads: int
    width: int
    queries: int
    tokens: tuple[int, ...] = ()


# Every attention layer of SD1.5 at 512²: eight heads, 77 text tokens, 4 context tokens.
SD15_LAYERS = tuple(
    AttentionLayer(operator, 8, width, queries, tokens)
    for operator, tokens in ((SELF, ()), (CROSS, (77, 4)))
    for width, queries in ((40, 64**2), (80, 32**2), (160, 16**2), (160, 8**2))
)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as `kernels.json` lists it.

    A block has `threads` x 1 x 1 threads and `shared_bytes` of dynamic shared memory. `registers` per thread and
    `spill_bytes` come from ptxas.
    """

    operator: str
    capability: int
    dtype: str
    heads: int
    width: int
    queries: int
    tokens: tuple[int, ...]
    block_queries: int
    entry: str
    file: str
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int


def write_kernels(
    folder: Path,
    layers: Iterable[AttentionLayer],
    dtypes: Iterable[str],
    capabilities: Iterable[int],
    report: Callable[[str], None],
) -> tuple[CompiledKernel, ...]:
    """Write `folder/kernels.json` and a PTX file for each kernel; equal layers share one.

    Args:
        dtypes: from `DTYPES`.
        capabilities: from `kernels.launch.CAPABILITIES`.
        report: called with the kernel being compiled.

    Raises:
        CompileError: a kernel cannot be compiled.
    """
    compiled = []
    layers = tuple(dict.fromkeys(layers))
    for capability in capabilities:
        for dtype in dtypes:
            for layer in layers:
                report(f"{layer.operator} {layer.width} x {layer.queries}, {dtype}, sm{capability}")
                kernel, ptx = compile_kernel(layer, dtype, capability)
                (folder / kernel.file).write_text(ptx, encoding="ascii")
                compiled.append(kernel)
    index = {"format_version": FORMAT_VERSION, "kernels": [asdict(kernel) for kernel in compiled]}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="ascii")
    return tuple(compiled)


def compile_kernel(layer: AttentionLayer, dtype: str, capability: int) -> tuple[CompiledKernel, str]:
    """Compile a layer's kernel, and return it with its PTX.

    Raises:
        CompileError: the kernel cannot be compiled.
    """
    kernel, config, constants = _specialize(layer, capability)
    binary = _compile(kernel, config, constants, dtype, capability)
    while binary.metadata.shared > PORTABLE_SHARED_BYTES and config.num_stages > 1:
        # A Triton version other than the tables' may lay out its buffers differently.
        config = replace(config, num_stages=config.num_stages - 1)
        binary = _compile(kernel, config, constants, dtype, capability)
    if binary.metadata.shared > PORTABLE_SHARED_BYTES:
        raise CompileError(
            f"{layer.operator} of width {layer.width} needs {binary.metadata.shared} bytes of shared memory"
        )
    ptx = _without_hidden_parameters(binary.asm["ptx"], len(kernel.arg_names) - len(constants))
    registers, spill_bytes = _assemble(ptx, capability)
    tokens = "".join(f"-{count}" for count in layer.tokens)
    return CompiledKernel(
        **asdict(layer),
        capability=capability,
        dtype=dtype,
        block_queries=config.block_queries,
        entry=binary.metadata.name,
        file=f"{layer.operator}-{dtype}-{layer.heads}x{layer.width}-{layer.queries}{tokens}-sm{capability}.ptx",
        threads=32 * config.num_warps,
        shared_bytes=binary.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
    ), ptx


def _compile(kernel: Any, config: LaunchConfig, constants: dict[str, int], dtype: str, capability: int) -> Any:
    names = kernel.arg_names
    types = {name: "*" + _TRITON_DTYPES[dtype] if name.startswith("p_") else "i32" for name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.startswith("p_")},
    )
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "ptx_version": _PTX_VERSIONS.get(capability, _OLDEST_PTX),
        "enable_fp_fusion": True,
    }
    with triton.knobs.compilation.scope():
        # Line information would contain the path of the sources.
        triton.knobs.compilation.disable_line_info = True
        try:
            return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:  # compiler passes and ptxas raise all kinds of exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompileError(f"Triton {triton.__version__} cannot compile for sm{capability}: {reason}") from error


def _specialize(layer: AttentionLayer, capability: int) -> tuple[Any, LaunchConfig, dict[str, int]]:
    """Return the kernel of a layer's operator, its launch configuration, and its compile-time constants."""
    shape = AttentionShape(layer.queries, layer.width, _ELEMENT_BYTES)
    main, tail = split_width(layer.width)
    constants = {"HEADS": layer.heads, "WIDTH": layer.width, "MAIN": main, "TAIL": tail, "QUERIES": layer.queries}
    if layer.operator == SELF:
        kernel, config = injected_self_attention_kernel, self_attention_launch(shape, capability, portable=True)
    else:
        kernel, config = context_cross_attention_kernel, cross_attention_launch(shape)
        constants |= dict(zip(("TEXT_TOKENS", "CONTEXT_TOKENS"), layer.tokens, strict=True))
    return kernel, config, {**constants, "BLOCK_QUERIES": config.block_queries, "BLOCK_TOKENS": config.block_tokens}


def _without_hidden_parameters(ptx: str, count: int) -> str:
    """Return the PTX with its first `count` parameters only.

    Triton appends pointers to scratch memory that these kernels never use, and other launchers would have to pass.
    """
    head, opening, rest = ptx.partition(".visible .entry ")
    parameters, closing, body = rest.partition(")")
    name, bracket, listed = parameters.partition("(")
    lines = [line.strip().rstrip(",") for line in listed.strip().splitlines()]
    for line in lines[count:]:
        hidden = line.split()[-1]
        if re.search(rf"\b{re.escape(hidden)}\b", body):
            raise AssertionError(f"{name} uses its hidden parameter {hidden}")
    kept = ",\n".join("\t" + line for line in lines[:count])
    return f"{head}{opening}{name}{bracket}\n{kept}\n{closing}{body}"


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers per thread and spilled bytes, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="ascii")
        architecture = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", architecture, str(source), "-o", os.devnull]
        finished = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", errors="replace")
    output = finished.stderr
    if finished.returncode != 0:
        raise CompileError(f"ptxas rejects the kernel for sm{capability}: {(output.splitlines() or ['no reason'])[0]}")
    registers, spilled = re.search(r"Used (\d+) registers", output), re.search(r"(\d+) bytes spill stores", output)
    if registers is None or spilled is None:
        raise AssertionError(f"ptxas did not report registers and spills: {output}")
    return int(registers[1]), int(spilled[1])
