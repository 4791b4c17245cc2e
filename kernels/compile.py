"""`python -m kernels.compile`: the Triton kernels to PTX, ahead of time and without a GPU.

PTX is for one compute capability; the driver of such a device finishes its compilation. What a launch needs stands in
`kernels.json` beside it, so whoever launches a kernel needs neither Triton nor PyTorch. The same sources and the same
Triton give the same bytes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
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
# The oldest PTX that knows the capability, and so the oldest driver: 8.0 is CUDA 12.0's, 8.7 is CUDA 12.8's.
_PTX_VERSIONS = MappingProxyType({80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88})
CAPABILITIES = tuple(_PTX_VERSIONS)
DEFAULT_CAPABILITIES = (80, 86, 87, 89, 90, 100, 120)
_TRITON_DTYPES = MappingProxyType({"float16": "fp16", "bfloat16": "bf16"})
DTYPES = tuple(_TRITON_DTYPES)
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class AttentionLayer:
    """The sizes that a kernel is compiled for; batch, guidance halves and reference tokens are free.

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

    Its block is `threads` x 1 x 1, with `shared_bytes` of dynamic shared memory. `registers` (a thread) and
    `spill_bytes` are from the assembler's report.
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
    """Write `folder/kernels.json` and a PTX file a kernel; layers that are alike share one.

    Args:
        dtypes: of `DTYPES`. capabilities: of `CAPABILITIES`.
        report: called with what is being compiled.
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
    """A layer's kernel, and its PTX."""
    kernel, config, constants = _specialized(layer, capability)
    made = _compiled(kernel, config, constants, dtype, capability)
    while made.metadata.shared > PORTABLE_SHARED_BYTES and config.num_stages > 1:
        # Another version of Triton than the table was made with may lay its buffers out differently.
        config = replace(config, num_stages=config.num_stages - 1)
        made = _compiled(kernel, config, constants, dtype, capability)
    ptx = _without_hidden_parameters(made.asm["ptx"], len(kernel.arg_names) - len(constants))
    registers, spill_bytes = _assembled(ptx, capability)
    tokens = "".join(f"-{count}" for count in layer.tokens)
    return CompiledKernel(
        **asdict(layer),
        capability=capability,
        dtype=dtype,
        block_queries=config.block_queries,
        entry=made.metadata.name,
        file=f"{layer.operator}-{dtype}-{layer.heads}x{layer.width}-{layer.queries}{tokens}-sm{capability}.ptx",
        threads=32 * config.num_warps,
        shared_bytes=made.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
    ), ptx


def _compiled(kernel: Any, config: LaunchConfig, constants: dict[str, int], dtype: str, capability: int) -> Any:
    names = kernel.arg_names
    types = {name: "*" + _TRITON_DTYPES[dtype] if name.startswith("p_") else "i32" for name in names}
    with triton.knobs.compilation.scope():
        # Line information would name the folder that the sources lie in.
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(
            ASTSource(
                fn=kernel,
                signature={name: "constexpr" if name in constants else types[name] for name in names},
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.startswith("p_")},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "ptx_version": _PTX_VERSIONS[capability],
                "enable_fp_fusion": True,
            },
        )


def _specialized(layer: AttentionLayer, capability: int) -> tuple[Any, LaunchConfig, dict[str, int]]:
    """The kernel of a layer's operator, its launch, and its compile-time constants."""
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
    """The PTX with its first `count` parameters alone: Triton appends pointers to memory that these kernels never use.

    A launcher other than Triton's would have to pass them.
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


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and spilled bytes, by the assembler's report."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="ascii")
        architecture = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", architecture, str(source), "-o", os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise AssertionError(f"the assembler did not report registers and spills: {said}")
    return int(registers[1]), int(spilled[1])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kernels.compile",
        description="Compile both operators' kernels for every attention layer of SD1.5 at 512², in fp16 and bf16, to "
        "PTX. No GPU is needed.",
    )
    default = ",".join(map(str, DEFAULT_CAPABILITIES))
    p.add_argument(
        "--capabilities",
        default=default,
        metavar="LIST",
        help=f"separated by commas, of {', '.join(map(str, CAPABILITIES))} (default: %(default)s)",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = parser()
    options = p.parse_args(arguments)
    asked = dict.fromkeys(options.capabilities.split(","))
    unknown = [text for text in asked if text.strip() not in map(str, CAPABILITIES)]
    if unknown:
        p.error(f"--capabilities: no {', '.join(map(repr, unknown))}; there are: {', '.join(map(str, CAPABILITIES))}")
    out = options.out.absolute()
    if out.exists():
        p.error(f"--out {options.out}: exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        p.error(f"--out {options.out}: cannot be written: {error.strerror}")
    try:
        say = _progress if sys.stderr.isatty() else _silent
        compiled = write_kernels(partial, SD15_LAYERS, DTYPES, [int(text) for text in asked], say)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print_table(compiled)
    return 0


def _progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    """Where nobody watches."""


def _print_table(compiled: Iterable[CompiledKernel]) -> None:
    print(f"{'kernel':<64} {'threads':>7} {'shared':>7} {'registers':>9} {'spilled':>7}")
    for k in compiled:
        print(f"{k.file:<64} {k.threads:>7} {k.shared_bytes:>7} {k.registers:>9} {k.spill_bytes:>7}")


if __name__ == "__main__":
    sys.exit(main())
