"""One network to a package of PyTorch's inductor: code that was compiled ahead of time, and none of the weights.

The code is compiled from the network's structure, with random numbers in place of the weights, so that it serves every
checkpoint of this structure. The weights are read from their files when a package is loaded.
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
    """How packages are compiled.

    is_measured: where a kernel may be chosen, what this machine's device says; False: by the rules of `export.cross`.
    max_autotune: measure several kernels of each product and of what is fused, and take the fastest.
    channels_last: convolutions' weights are stored with their channels last, as tensor cores read them.
    wrapper_level: of the C++ compiler, for the code that calls the kernels.
    """

    max_autotune: bool
    channels_last: bool
    wrapper_level: str
    is_measured: bool = True

    @classmethod
    def of(cls, network: str, capability: int, is_measured: bool = True) -> "PackageOptions":
        """What pays: on a CPU, where nothing is served, that compiling is quick; on a GPU, care with what every picture
        is made with, and not with what runs once a subject or a prompt.
        """
        on_gpu = capability != CPU_CAPABILITY
        with_care = on_gpu and network in GENERATION_NETWORKS
        return cls(with_care, on_gpu, "O1" if with_care else "O0", is_measured)

    @property
    def settings(self) -> dict[str, Any]:
        """In the words of `torch._inductor.config`."""
        return {
            "max_autotune": self.max_autotune,
            # cuDNN alone: measuring inductor's own convolutions beside it takes minutes.
            "max_autotune_conv_backends": "ATEN",
            "aot_inductor.compile_wrapper_opt_level": self.wrapper_level,
            # The kernels are part of the code, which can be loaded without a folder of them.
            "aot_inductor.embed_kernel_binary": True,
            # They are kept elsewhere for ever, and take as long to make as they save.
            "aot_inductor.precompile_headers": False,
            # As many threads as there are where it runs, not where it was compiled.
            "cpp.dynamic_threads": True,
            # The weights stay outside, and no value of theirs becomes part of the code.
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,
            "joint_graph_constant_folding": False,
            **({} if self.is_measured else SETTINGS),
        }


@dataclass(frozen=True)
class PackageRequest:
    """A network to compile: of the checkpoint nothing but its configurations is read."""

    checkpoint: Checkpoint
    network: Network
    geometry: Geometry
    precision: Precision
    capability: int
    is_measured: bool = True

    @property
    def options(self) -> PackageOptions:
        """How it is compiled."""
        return PackageOptions.of(self.network.name, self.capability, self.is_measured)

    def structure(self) -> nn.Module:
        """The module on the meta device, convolutions' weights laid out as the package wants them."""
        module = self.network.structure(self.checkpoint, self.geometry, self.precision)
        _drop_placeholders(module)
        # Only what has four dimensions has channels; inputs keep their layout, which is that of the buffers.
        return module.to(memory_format=torch.channels_last) if self.options.channels_last else module

    def inductor_configs(self) -> dict[str, Any]:
        """The options, and what the package is to say of itself."""
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
    except (RuntimeError, subprocess.CalledProcessError) as error:  # such as: no C++ compiler, no memory left
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
    """Note in a package which weights it may ask for, and add the tensors that the module made itself.

    Args:
        state: the module's weights; of these only dtypes and shapes count.
        constants: those of the traced program, by name.
    """
    weights = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in state.items()}
    own = {name: t.cpu().contiguous() for name, t in constants.items() if isinstance(t, Tensor) and name not in weights}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(WEIGHTS_MEMBER, json.dumps({"channels_last": options.channels_last, "tensors": weights}))
        archive.writestr(CONSTANTS_MEMBER, save(own))


def tune_for_usual_sizes(program: torch.export.ExportedProgram, spec: NetworkSpec) -> None:
    """Have kernels chosen and measured for a network's usual sizes, such as one picture with both halves of guidance.

    Tracing needs other ones: it takes a size of 1 for a constant.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, tensor in zip(program.graph_signature.user_inputs, spec.inputs, strict=True):
        shape = nodes[str(name)].meta["val"].shape
        for axis, dim in tensor.dynamic_axes.items():
            size = shape[axis].node
            size.shape_env.var_to_hint_override[size.expr] = dim.opt


def fill_with_noise(module: nn.Module) -> None:
    """Random numbers for weights: inductor would fold a tensor of equal values, and a GPU is faster on zeros."""
    generators: dict[torch.device, torch.Generator] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            generator = generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(0))
            tensor.data.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.data.zero_()


def reason(error: Exception) -> str:
    """What a compiler said, without the long command that it was called with; else all that the error says."""
    said = f"{error}\n{getattr(error, 'stderr', None) or ''}"
    return one_line(next((line for line in said.splitlines() if "error: " in line), said))


def _drop_placeholders(module: nn.Module) -> None:
    """Drop the buffers that no weights are for, and no `forward` of ours reads."""
    for part in module.modules():
        for name in [name for name, _ in part.named_buffers(recurse=False)]:
            if name in part._non_persistent_buffers_set:
                delattr(part, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's notices of its own deprecations and of kernels that it measured and did not take."""
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
