"""Compile one network to an AOTInductor package: code compiled ahead of time, without weights.

The network is compiled with random numbers in place of its weights, so the package serves every checkpoint of the same
structure. The weights are read from their files when a package is loaded.
"""

import contextlib
import gc
import json
import logging
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package

from export.checkpoints.model import Checkpoint
from export.cross.rules import SETTINGS
from export.host_compiler import PORTABLE_SETTINGS, portable_compiler
from export.networks import Network
from export.tracing import tracing_arguments
from moma_rt.backends.inductor import TENSORS_NOTE, tensors_note
from moma_rt.backends.package_weights import CONSTANTS_MEMBER, WEIGHTS_MEMBER
from moma_rt.bundle.engines import CPU_CAPABILITY
from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision
from moma_rt.errors import BundleError
from moma_rt.messages import one_line

PACKAGE_NAME = "engine.pt2"


@dataclass(frozen=True)
class PackageOptions:
    """Compile options of a package.

    max_autotune: benchmark several kernels for each matrix product and fused operation, and take the fastest.
    channels_last: store convolution weights with channels last, as tensor cores read them.
    wrapper_level: the C++ optimization level of the code that launches the kernels.
    is_measured: choose kernels by measuring on this machine's device; False: by the rules of `export.cross`.
    """

    max_autotune: bool
    channels_last: bool
    wrapper_level: str
    is_measured: bool = True

    @classmethod
    def of(cls, network: str, capability: int, is_measured: bool = True) -> "PackageOptions":
        """Return the options for a network: tuned if it runs for every picture on a GPU, else quick to compile.

        Networks that run once per subject or prompt, and CPUs, which serve no requests, do not repay long compiling.
        """
        on_gpu = capability != CPU_CAPABILITY
        is_tuned = on_gpu and network in GENERATION_NETWORKS
        return cls(is_tuned, on_gpu, "O1" if is_tuned else "O0", is_measured)

    @property
    def settings(self) -> dict[str, Any]:
        """The options as entries of `torch._inductor.config`."""
        return {
            "max_autotune": self.max_autotune,
            # cuDNN only: benchmarking inductor's own convolutions too takes minutes.
            "max_autotune_conv_backends": "ATEN",
            "aot_inductor.compile_wrapper_opt_level": self.wrapper_level,
            # With embedded kernels the code loads without a folder of kernel files.
            "aot_inductor.embed_kernel_binary": True,
            # Precompiled headers stay in another cache forever, and take as long to make as they save.
            "aot_inductor.precompile_headers": False,
            # Use the thread count of the machine that runs the code, not of the one that compiles it.
            "cpp.dynamic_threads": True,
            # Keep weights out of the package, and their values out of the code.
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,
            "joint_graph_constant_folding": False,
            **({} if self.is_measured else SETTINGS),
        }


@dataclass(frozen=True)
class PackageRequest:
    """A network to compile; of the checkpoint, only the configurations are read."""

    checkpoint: Checkpoint
    network: Network
    geometry: Geometry
    precision: Precision
    capability: int
    is_measured: bool = True

    @property
    def options(self) -> PackageOptions:
        """The network's compile options."""
        return PackageOptions.of(self.network.name, self.capability, self.is_measured)

    def structure(self) -> nn.Module:
        """Return the module on the meta device, with convolution weights in the package's memory format."""
        module = self.network.structure(self.checkpoint, self.geometry, self.precision)
        _drop_placeholders(module)
        # This changes four-dimensional weights only; inputs keep the layout of the runtime's buffers.
        return module.to(memory_format=torch.channels_last) if self.options.channels_last else module

    def inductor_configs(self) -> dict[str, Any]:
        """Return inductor's settings, with a description of the package's tensors as metadata."""
        spec = self.network.spec(self.geometry, self.precision)
        return {**self.options.settings, "aot_inductor.metadata": {TENSORS_NOTE: tensors_note(spec)}}


def write_package(request: PackageRequest, folder: Path) -> None:
    """Compile a network for the CPU, or for the GPU that PyTorch sees here, and write `folder/engine.pt2`.

    Raises:
        BundleError: inductor cannot compile it; the message is PyTorch's own.
    """
    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix="moma-rt-") as place:
            _compile(request, folder / PACKAGE_NAME, Path(place))
    except (RuntimeError, subprocess.CalledProcessError) as error:  # such as a missing C++ compiler, or out of memory
        raise BundleError(
            f"{request.network.name}: PyTorch {torch.__version__} cannot compile it: {reason(error)}"
        ) from None
    finally:
        gc.collect()
        if request.capability != CPU_CAPABILITY:
            torch.cuda.empty_cache()


def _compile(request: PackageRequest, path: Path, place: Path) -> None:
    device, configs = "cpu", request.inductor_configs()
    if request.capability != CPU_CAPABILITY:
        device = "cuda"
        configs |= {**PORTABLE_SETTINGS, "cpp.cxx": (None, str(portable_compiler(place)))}
    module = request.structure().to_empty(device=device)
    fill_with_noise(module)
    spec = request.network.spec(request.geometry, request.precision)
    arguments, shapes = tracing_arguments(request.network, spec, request.geometry, device)
    program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    tune_for_usual_sizes(program, spec)
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    add_to_package(path, module.state_dict(), program.constants, request.options)


def add_to_package(
    path: Path, state: Mapping[str, Tensor], constants: Mapping[str, Any], options: PackageOptions
) -> None:
    """Add to a package the list of weights that it may ask for, and the tensors that the module itself creates.

    Args:
        state: the module's weights; only their dtypes and shapes are used.
        constants: the traced program's constants, by name.
    """
    weights = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in state.items()}
    own = {name: t.cpu().contiguous() for name, t in constants.items() if isinstance(t, Tensor) and name not in weights}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(WEIGHTS_MEMBER, json.dumps({"channels_last": options.channels_last, "tensors": weights}))
        archive.writestr(CONSTANTS_MEMBER, save(own))


def tune_for_usual_sizes(program: torch.export.ExportedProgram, spec: NetworkSpec) -> None:
    """Make inductor choose and measure kernels for a network's usual sizes, such as one picture with guidance.

    Tracing needs other sizes, since it takes a size of 1 for a constant.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, tensor in zip(program.graph_signature.user_inputs, spec.inputs, strict=True):
        shape = nodes[str(name)].meta["val"].shape
        for axis, dim in tensor.dynamic_axes.items():
            size = shape[axis].node
            size.shape_env.var_to_hint_override[size.expr] = dim.opt


def fill_with_noise(module: nn.Module) -> None:
    """Fill weights with random numbers: inductor would fold constant tensors, and GPUs are faster on zeros."""
    generators: dict[torch.device, torch.Generator] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            generator = generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(0))
            tensor.data.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.data.zero_()


def reason(error: Exception) -> str:
    """Return a compiler's error line without its long command line, or else the whole error in one line."""
    said = f"{error}\n{getattr(error, 'stderr', None) or ''}"
    return one_line(next((line for line in said.splitlines() if "error: " in line), said))


def _drop_placeholders(module: nn.Module) -> None:
    """Delete non-persistent buffers, which have no weights and are read by no `forward` here."""
    for part in module.modules():
        for name in [name for name, _ in part.named_buffers(recurse=False)]:
            if name in part._non_persistent_buffers_set:
                delattr(part, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PyTorch's deprecation warnings and its messages about kernels that it measured and rejected."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
