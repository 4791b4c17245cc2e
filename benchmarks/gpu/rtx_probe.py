"""Test whether TensorRT-RTX runs on this GPU: `python -m benchmarks.gpu.rtx_probe --carried DIR --work DIR`.

Builds a small fp16 network for several devices, and runs each engine, compares it with PyTorch and captures it as a
CUDA graph. The result is which of the engines this GPU accepts. Without a GPU the engines are only built.

TensorRT-RTX comes from `rtx.tar.xz.*` in --carried and --work, parts of an archive that benchmarks.gpu.pack wrote, or
from an installed package.
"""

import argparse
import importlib
import lzma
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.environment import environment, write_results
from benchmarks.gpu.carried import RTX_PART
from moma_rt.errors import MomaError, print_output, run_command
from moma_rt.messages import one_line

PROGRAM = "benchmarks.gpu.rtx_probe"
MODULE = "tensorrt_rtx"
_BATCH, _HEADS, _GRID, _WIDTH = 2, 8, 64, 40
_CHANNELS, _TOKENS = _HEADS * _WIDTH, _GRID * _GRID
# Devices to build for; None leaves the choice to the library.
_CAPABILITIES = (None, "CURRENT", "SM80", "SM89", "SM120")
_RUNS, _WARM_UPS = 50, 20
# For attention over 4096 tokens in fp16, relative L2.
_TOLERANCE = 2e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code, which is also 0 if TensorRT-RTX refuses this GPU."""
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.partition(": `")[0] + ".")
    p.add_argument("--carried", type=Path, required=True, metavar="DIR", help="folder that benchmarks.gpu.pack wrote")
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder to unpack the library into")
    options = p.parse_args(arguments)
    return run_command(PROGRAM, lambda: _probe(options))


def _probe(options: argparse.Namespace) -> int:
    trt = library(options.carried, options.work)
    if trt is None:
        print_output(f"TensorRT-RTX was not packed: no {RTX_PART}* in {options.carried}, and it is not installed")
        return 0
    where = environment(f"python -m {PROGRAM} --carried DIR --work DIR")
    cases: list[dict[str, Any]] = []
    proto, reference = model()
    for capability in _CAPABILITIES:
        cases.append({"capability": capability, **tried(lambda c=capability: case(trt, proto, reference, c))})
        write_results("rtx_probe", {"environment": where, "version": trt.__version__, "cases": cases})
    said = "; ".join(f"{one['capability'] or 'default'} {described(one)}" for one in cases)
    print_output(f"TensorRT-RTX {trt.__version__}: {said}")
    return 0 if all(one.get("is_right", True) for one in cases) else 1


def library(carried: Path, work: Path) -> Any:
    """Import TensorRT-RTX, after unpacking the parts of its archive if there are any; None if it is missing.

    Raises:
        MomaError: the parts are not a complete archive.
    """
    # In the call that carried it, a part is in both folders.
    parts = list({path.name: path for folder in (work, carried) for path in folder.glob(f"{RTX_PART}*")}.values())
    if parts:
        site = work / "rtx"
        if not site.is_dir():
            unpack(parts, site)
        sys.path.insert(0, str(site))
    try:
        return importlib.import_module(MODULE)
    except ImportError:
        return None


def unpack(parts: Sequence[Path], site: Path) -> None:
    """Concatenate the parts in the order of their names, and unpack the archive.

    Raises:
        MomaError: the parts are not a complete archive.
    """
    site.parent.mkdir(parents=True, exist_ok=True)
    whole, partial = site.parent / ".partial-rtx.tar.xz", site.parent / ".partial-rtx"
    with whole.open("wb") as target:
        for part in sorted(parts, key=lambda path: path.name):
            target.write(part.read_bytes())
    try:
        with tarfile.open(whole, "r:xz") as files:
            files.extractall(partial, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        names = ", ".join(sorted(path.name for path in parts))
        raise MomaError(f"{names} are not a complete archive: {one_line(error)}") from None
    partial.replace(site)
    whole.unlink()


def model() -> tuple[onnx.ModelProto, Callable[[torch.Tensor], torch.Tensor]]:
    """Return [2,320,64,64] → convolution → self-attention with 8 heads of width 40, and the same in fp32 PyTorch."""
    random = np.random.default_rng(0)
    kernel = (random.standard_normal((_CHANNELS, _CHANNELS, 3, 3)) * 0.02).astype(np.float16)
    weight = (random.standard_normal((_WIDTH, _WIDTH)) * 0.1).astype(np.float16)
    half = TensorProto.FLOAT16
    shape = np.array([_BATCH, _HEADS, _WIDTH, _TOKENS], np.int64)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["t", "weight"], ["q"]),
        helper.make_node("Attention", ["q", "t", "t"], ["y"], scale=_WIDTH**-0.5),
    ]
    constants = {"kernel": kernel, "weight": weight, "shape": shape}
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", half, [_BATCH, _CHANNELS, _GRID, _GRID])],
        [helper.make_tensor_value_info("y", half, [_BATCH, _HEADS, _TOKENS, _WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )

    def reference(x: torch.Tensor) -> torch.Tensor:
        kernel_, weight_ = (torch.from_numpy(array).to(x.device).float() for array in (kernel, weight))
        convolved = torch.nn.functional.conv2d(x.float(), kernel_, padding=1)
        tokens = convolved.reshape(*shape.tolist()).transpose(2, 3)
        return torch.nn.functional.scaled_dot_product_attention(tokens @ weight_, tokens, tokens)

    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), reference


def tried(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a case; an error of the library is its result."""
    try:
        return run()
    except (RuntimeError, TypeError, AttributeError, MomaError) as error:
        return {"refused": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def case(
    trt: Any, proto: onnx.ModelProto, reference: Callable[..., torch.Tensor], capability: str | None
) -> dict[str, Any]:
    """Build the engine for a device, and run it if there is a GPU.

    Raises:
        MomaError: the library returned nothing; the message names the stage.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    plan = built(trt, logger, proto, capability)
    found: dict[str, Any] = {"bytes": plan.nbytes}
    if not torch.cuda.is_available():
        return found
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise MomaError("the engine cannot be loaded on this GPU")
    context = engine.create_execution_context()
    if context is None:
        raise MomaError("there is no execution context for it on this GPU")
    return found | ran(context, reference)


def built(trt: Any, logger: Any, proto: onnx.ModelProto, capability: str | None) -> Any:
    """Build and return the serialized engine.

    Raises:
        MomaError: the graph cannot be parsed or built.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise MomaError(f"the graph cannot be parsed: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MomaError("the builder returned nothing")
    return plan


def ran(context: Any, reference: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Run an engine: its error, milliseconds, and whether a CUDA graph of it can be captured and replayed."""
    stream: Any = torch.cuda.Stream()
    x = torch.randn(_BATCH, _CHANNELS, _GRID, _GRID, device="cuda", dtype=torch.half)
    y = torch.full((_BATCH, _HEADS, _TOKENS, _WIDTH), float("nan"), device="cuda", dtype=torch.half)
    # The tensors are written on the current stream and read on another one.
    stream.wait_stream(torch.cuda.current_stream())
    for name, tensor in (("x", x), ("y", y)):
        context.set_tensor_address(name, tensor.data_ptr())

    def enqueue() -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise MomaError("the engine cannot be enqueued")

    enqueue()
    stream.synchronize()
    wanted = reference(x)
    error = ((y.float() - wanted).norm() / wanted.norm()).item()
    for _ in range(_WARM_UPS):
        enqueue()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    for _ in range(_RUNS):
        enqueue()
    end.record(stream)
    stream.synchronize()
    milliseconds = round(start.elapsed_time(end) / _RUNS, 4)
    captured = tried(lambda: captured_error(enqueue, stream, y, wanted))
    return {"relative_error": error, "is_right": error <= _TOLERANCE, "ms": milliseconds, "graph": captured}


def captured_error(enqueue: Callable[[], None], stream: Any, y: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Capture and replay a CUDA graph, and return the error of its output `y`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        enqueue()
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return {"relative_error": ((y.float() - wanted).norm() / wanted.norm()).item()}


def described(found: dict[str, Any]) -> str:
    """Describe a case in a few words."""
    if "refused" in found:
        return f"refused ({found['refused'][:80]})"
    if "ms" not in found:
        return f"built, {found['bytes']} bytes"
    graph = "no graph" if "refused" in found["graph"] else "graph"
    return f"{found['ms']:.3f} ms, error {found['relative_error']:.1e}, {graph}"


if __name__ == "__main__":
    sys.exit(main())
