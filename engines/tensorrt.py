"""Compiles one network's ONNX graph to a TensorRT or TensorRT-RTX engine.

Both libraries have the same Python API, so one code path serves both flavours. Networks are strongly typed: every type
comes from the ONNX graph, and no builder flag changes one. TensorRT builds for the device it runs on; TensorRT-RTX
builds ahead of time, one engine for any set of compute capabilities, and needs no device for it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.plugins import NetworkKernels, registered
from moma_rt.backends.libraries import library, library_log, library_version, version_tuple
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, InputError
from moma_rt.files import atomic_write
from moma_rt.messages import one_line, warn

ENGINE_NAME = "engine.trt"
LAYERS_NAME = "layers.json"
# By its release notes, a refittable engine may give wrong results in this version, refitted or not.
_BROKEN_REFIT = (11, 3)

Report = Callable[[str], None]


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built.

    refittable: keep the engine's weights replaceable, which prevents some fusions (TensorRT only).
    layers: also write the engine's fused layers as JSON, which needs a device.
    timing_cache: file of TensorRT's timing cache, read and updated, so that later builds are faster (TensorRT only).
    """

    refittable: bool = False
    layers: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class EngineRequest:
    """A graph, what it is compiled for, and the kernels for its custom operators (None: standard operators).

    `weights_root` is the folder that the graph's external data paths are relative to.
    """

    flavour: Flavour
    capabilities: tuple[int, ...]
    onnx: Path
    weights_root: Path
    spec: NetworkSpec
    options: EngineOptions = EngineOptions()
    kernels: NetworkKernels | None = None

    @property
    def graph(self) -> tuple[bytes, str]:
        """The serialized graph, and the path that the parser takes as its origin: it looks for weights beside it."""
        return self.onnx.read_bytes(), str(self.weights_root / self.onnx.name)


@dataclass(frozen=True)
class EngineFacts:
    """Device memory in bytes that an engine needs at its largest shapes; None where the builder did not report it."""

    weight_bytes: int | None
    activation_bytes: int | None


def check_options(flavour: Flavour, version: str, options: EngineOptions) -> None:
    """Refuse options that a library does not support or is known to get wrong.

    Raises:
        InputError: refittable engines of TensorRT-RTX, or of a TensorRT version that builds wrong ones.
    """
    if options.refittable and flavour is Flavour.TENSORRT_RTX:
        raise InputError("TensorRT-RTX builds no refittable engines ahead of time; leave out --refittable")
    if options.refittable and version_tuple(version)[:2] == _BROKEN_REFIT:
        raise InputError(f"TensorRT {version} builds refittable engines that may be wrong; install another version")


def build_engine(request: EngineRequest, folder: Path, report: Report) -> EngineFacts:
    """Compile a graph and write `folder/engine.trt`.

    Args:
        report: called with the builder's progress.

    Raises:
        BundleError: the library cannot parse or compile the graph; the message holds its first error.
        KeyboardInterrupt: Ctrl-C was pressed; raised once the builder has stopped.
    """
    with registered(request.kernels):
        return _build_engine(request, folder, report)


def _build_engine(request: EngineRequest, folder: Path, report: Report) -> EngineFacts:
    trt = library(request.flavour)
    log = library_log(request.flavour)
    log.begin()
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError):  # raised by the bindings for a null pointer
        raise BundleError(f"{_label(request)} cannot build here: {log.error or 'it did not say why'}") from None
    network = builder.create_network(_network_flags(trt, request))
    if network is None:
        raise BundleError(f"{_label(request)} cannot build here: {log.error or 'it did not say why'}")
    parser = trt.OnnxParser(network, log)
    if not parser.parse(*request.graph):
        found = parser.get_error(0).desc() if parser.num_errors else ""
        raise BundleError(f"{_label(request)} cannot parse it: {log.error or one_line(found)}")
    config = builder.create_builder_config()
    _configure(trt, config, request)
    profile = _profile(builder, request.spec)
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if monitor.interruption is not None:
        raise monitor.interruption
    if serialized is None or not serialized.nbytes:
        raise BundleError(f"{_label(request)} cannot compile it: {log.error or 'the builder did not say why'}")
    (folder / ENGINE_NAME).write_bytes(memoryview(serialized))
    _save_timing_cache(config, request)
    if request.options.layers:
        (folder / LAYERS_NAME).write_text(_layers(trt, log, serialized), encoding="utf-8")
    return EngineFacts(log.memory.get("Weights"), log.memory.get("Activation"))


def refit_engine(engine_file: Path, request: EngineRequest, folder: Path) -> None:
    """Put the weights of `request`'s graph into a refittable engine, and write the result to `folder/engine.trt`.

    Raises:
        BundleError: the engine is not refittable, or the graph has another structure.
    """
    with registered(request.kernels):
        _refit_engine(engine_file, request, folder)


def _refit_engine(engine_file: Path, request: EngineRequest, folder: Path) -> None:
    trt = library(request.flavour)
    log = library_log(request.flavour)
    log.begin()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None or not engine.refittable:
        raise BundleError(f"{engine_file} is not refittable: {log.error or 'it was built without --refittable'}")
    refitter = trt.Refitter(engine, log)
    parser_refitter = trt.OnnxParserRefitter(refitter, log)
    if not parser_refitter.refit_from_bytes(*request.graph) or refitter.get_missing_weights():
        raise BundleError(f"{engine_file} cannot take the weights of {request.onnx}: {log.error or 'other names'}")
    if not refitter.refit_cuda_engine():
        raise BundleError(f"{engine_file} could not be refitted: {log.error}")
    (folder / ENGINE_NAME).write_bytes(memoryview(engine.serialize()))


def _network_flags(trt: Any, request: EngineRequest) -> int:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    # Looked up by name: TensorRT 11 numbers the flags differently.
    if request.kernels is not None and hasattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def _configure(trt: Any, config: Any, request: EngineRequest) -> None:
    options = request.options
    if request.flavour is Flavour.TENSORRT_RTX:
        config.num_compute_capabilities = len(request.capabilities)
        for index, capability in enumerate(request.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
        # Otherwise an engine may allocate while it runs, and cannot be captured as a CUDA graph. The runtime provides
        # the memory of each context anyway.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    else:
        if options.refittable:
            config.set_flag(trt.BuilderFlag.REFIT)
        if options.timing_cache is not None:
            known = b""
            with contextlib.suppress(OSError):
                known = options.timing_cache.read_bytes()
            if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
                # The cache is from another GPU model of the same capability.
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    if options.layers:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _profile(builder: Any, spec: NetworkSpec) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.dynamic_axes:
            profile.set_shape(tensor.name, tensor.min_shape, tensor.opt_shape, tensor.max_shape)
    return profile


def _save_timing_cache(config: Any, request: EngineRequest) -> None:
    path = request.options.timing_cache
    timing_cache = config.get_timing_cache() if path is not None else None
    if path is not None and timing_cache is not None:
        try:
            with atomic_write(path) as temporary:
                temporary.write_bytes(memoryview(timing_cache.serialize()))
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror or error}): the next build measures kernels again")


def _layers(trt: Any, log: Any, serialized: Any) -> str:
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        raise BundleError(f"the engine's layers cannot be listed: {log.error}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the progress of the outermost phases.

        An exception must not cross the builder's C++ frames: it is stored, and the builder is asked to stop.
        """

        def __init__(self) -> None:
            super().__init__()
            self.interruption: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
            self._report(f"compiling: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._report(f"compiling: {phase_name}, {step + 1} of {self._steps[phase_name]}")
            return self.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _report(self, text: str) -> None:
            try:
                report(text)
            except BaseException as error:  # Ctrl-C arrives here as well
                self.interruption = error

    return Monitor()


def _label(request: EngineRequest) -> str:
    return f"{request.spec.name}: {request.flavour.value} {library_version(request.flavour)}"
