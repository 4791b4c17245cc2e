"""Defines the steps of both calls with their order and time limits, and steps that only run when named."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.environment import gpu_facts
from benchmarks.gpu.carried import PACKAGES, SUBJECT_FILE
from benchmarks.gpu.runner import Group, Step
from engines.targets import parse_list
from moma_rt import backends
from moma_rt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GENERATION_NETWORKS = "text_encoder,denoiser,vae_decoder,context_projector"
EVERYTHING = f"{GENERATION_NETWORKS},vae_encoder,subject_encoder"
FIRST, SECOND = "first", "second"
# Seconds from the start to the end of a call.
CALLS = MappingProxyType({FIRST: 590.0, SECOND: 130.0})
# Only cuBLAS, because timing inductor's own matrix products as well takes minutes.
_GEMM = MappingProxyType({"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN"})
_NO_CACHE = MappingProxyType({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


@dataclass(frozen=True)
class Setup:
    """The folders of a run, and what it measures.

    Attributes:
        out: folder for the status and the archive of results.
        work: folder outside the sources that is kept between calls.
        carried: folder of packed files: wheels, and a bundle without weights.
        bundle: folder that the packed bundle is unpacked to and completed in.
        rehearse: run on a CPU with the tiny geometry.
        target: --target of export.build for the packed bundle.
    """

    out: Path
    work: Path
    carried: Path
    bundle: Path
    rehearse: bool
    backend: str
    target: str
    precision: str

    @classmethod
    def of(cls, environ: Mapping[str, str], call: str, *, needs_gpu: bool = True) -> "Setup":
        """Read the setup of a call from environment variables, named as the fields in capitals; SHIP is `carried`.

        Args:
            needs_gpu: False if no step will run.

        Raises:
            InputError: a variable has an invalid value, or there is neither a GPU nor REHEARSE=1.
        """
        rehearse = environ.get("REHEARSE", "0")
        if rehearse not in ("0", "1"):
            raise InputError(f"REHEARSE={rehearse}: it must be 1, or 0")
        gpu = None if rehearse == "1" else gpu_facts()
        if needs_gpu and rehearse == "0" and gpu is None:
            raise InputError("nvidia-smi finds no GPU on this machine; REHEARSE=1 runs every step on the CPU")
        backend = environ.get("BACKEND", "inductor")
        if backend not in backends.NAMES:
            raise InputError(f"BACKEND={backend}; there are: {', '.join(backends.NAMES)}")
        capability = "NN" if gpu is None else gpu["capability"].replace(".", "")
        usual = "cpu,inductor" if rehearse == "1" else f"inductor:sm{capability}"
        work = Path(environ.get("WORK", "/var/tmp/moma-rt-lease")).resolve()
        return cls(
            out=Path(environ.get("OUT", "build/lease")).resolve(),
            work=work,
            carried=Path(environ.get("SHIP", f".ship/{call}")).resolve(),
            bundle=Path(environ.get("BUNDLE", work / "bundle")).resolve(),
            rehearse=rehearse == "1",
            backend=backend,
            target=environ.get("TARGET", usual),
            precision=environ.get("PRECISION", "fp32" if rehearse == "1" else "fp16"),
        )

    @property
    def places(self) -> dict[str, str]:
        """Placeholders for this machine's paths in the results: the variables that set them."""
        variables = {self.out: "$OUT", self.work: "$WORK", self.carried: "$SHIP"}
        # The default is inside WORK, and needs no placeholder.
        bundle = {} if self.bundle.is_relative_to(self.work) else {self.bundle: "$BUNDLE"}
        named = {str(path): name for path, name in (variables | bundle).items()}
        return {str(ROOT): ".", **named, sys.executable: "python3"}

    @property
    def results(self) -> Path:
        """Folder of the results and logs of every step."""
        return self.work / "results"

    @property
    def subject(self) -> Path:
        """File of a subject with random keys and values, which the first call writes."""
        return self.work / SUBJECT_FILE

    @property
    def measured(self) -> Path:
        """Folder of the bundle that is built on this machine with autotuning."""
        return self.work / "measured"

    @property
    def whole(self) -> Path:
        """Folder of the bundle that can also enroll."""
        return self.work / "whole"

    @property
    def packages(self) -> Path:
        """Folder that wheels are installed into."""
        return self.work / PACKAGES


def groups(setup: Setup, call: str, names: Sequence[str]) -> list[Group]:
    """Return the steps of a call, in groups that run in parallel; or only the named steps, one after the other.

    Raises:
        InputError: an unknown step.
    """
    steps = all_steps(setup)
    if not names:
        return [tuple(steps[name] for name in group) for group in _CALLS[call]]
    chosen = parse_list("the steps", "step", ",".join(names), tuple(steps))
    return [(steps[name],) for name in steps if name in chosen]


_CALLS: Mapping[str, Sequence[Sequence[str]]] = MappingProxyType(
    {
        FIRST: (
            ("facts",),
            # In parallel, because one uses the GPU and the other the CPU.
            ("kernel_tests", "prepare"),
            ("denoiser",),
            ("profile",),
            ("baselines",),
            ("attention",),
            ("build",),
            ("latency",),
        ),
        SECOND: (("rtx_probe",), ("latency_again",), ("compiled",)),
    }
)


def all_steps(setup: Setup) -> dict[str, Step]:
    """Return every step by name, in the order in which they run."""
    step = _Steps(setup)
    shared = ("--bundle", setup.bundle)
    either = ("--bundle", setup.measured, "--bundle", setup.bundle)
    found = (
        Step("facts", step.module("facts", shared), 60),
        Step("kernel_tests", step.pytest("tests/kernels", "--ignore", "tests/kernels/test_ptx_on_gpu.py"), 100, 20),
        Step("prepare", step.prepare(), 120, 20),
        Step("denoiser", step.module("denoiser", shared), 90, 20),
        Step("profile", step.module("kernel_profile", shared), 40, 15),
        Step("baselines", step.module("baselines", shared), 75, 30),
        Step("attention", step.module("attention", shared), 80, 30),
        Step("build", step.build(setup.measured, GENERATION_NETWORKS), 240, 150, leaves=70, environment=_GEMM),
        Step("latency", step.latency(either), 90, 25),
        # The second call.
        Step("rtx_probe", step.rtx_probe(), 60, 10),
        Step("latency_again", step.latency(either), 45, 25),
        Step("compiled", step.module("baselines", shared, "compiled"), 100, 30),
        # Only when named.
        Step("timer_tests", step.pytest("tests/benchmarks/test_timer.py"), 60),
        Step("ptx", step.pytest("tests/kernels/test_ptx_on_gpu.py"), 240),
        Step("launches", step.sanitized(), 120),
        Step("memcheck", step.sanitized("memcheck"), 120, environment=_NO_CACHE),
        Step("racecheck", step.sanitized("racecheck"), 120, environment=_NO_CACHE),
        Step("speed", step.python("benchmarks.kernels", "--out", "kernels", "--minutes", "3.5"), 300),
        Step("tuning", step.python("benchmarks.kernels", "--out", "kernels_tuning", "--tune"), 300),
        Step("counters", step.module("counters", shared), 240),
        Step("whole_build", step.build(setup.whole, EVERYTHING), 570, environment=_GEMM),
        Step("soak", step.soak(), 570, 60),
        Step("soak_batches", step.soak("--max-batch", "4"), 570, 60),
        Step("latency_eager", step.compared("eager,plain,plain_graph"), 300, 60),
        Step("latency_compiled", step.compared("compiled,plain_compiled"), 560, 120),
    )
    return {each.name: step.rehearsed(each) for each in found}


@dataclass(frozen=True)
class _Steps:
    """Builds the command lines of steps."""

    setup: Setup

    def python(self, module: str, *arguments: object) -> tuple[str, ...]:
        return (sys.executable, "-m", module, *map(str, arguments))

    def module(self, name: str, bundles: Sequence[object] = (), *arguments: object) -> tuple[str, ...]:
        rehearse = ("--rehearse",) if self.setup.rehearse else ()
        backend = ("--backend", self.setup.backend)
        return self.python(f"benchmarks.gpu.{name}", *arguments, *bundles, *backend, *rehearse)

    def rehearsed(self, step: Step) -> Step:
        """Raise the time limit in a rehearsal, since a smaller machine may be slow."""
        if not self.setup.rehearse:
            return step
        return Step(step.name, step.command, 10 * step.seconds, environment=step.environment)

    def pytest(self, *arguments: str) -> tuple[str, ...]:
        workers = min(8, len(os.sched_getaffinity(0)))
        parallel = ("-n", workers) if importlib.util.find_spec("xdist") and not self.setup.rehearse else ()
        # Without a GPU these tests are collected and skipped.
        return self.python("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *parallel, *arguments)

    def prepare(self) -> tuple[str, ...]:
        setup = self.setup
        places = ("--carried", setup.carried, "--work", setup.work, "--bundle", setup.bundle)
        options = (*self._build_options(GENERATION_NETWORKS), "--target", setup.target)
        return self.python("benchmarks.gpu.prepare", *places, "--", *options)

    def build(self, out: Path, names: str) -> tuple[str, ...]:
        # A rehearsal only builds the network that compiles fastest.
        options = self._build_options("context_projector" if self.setup.rehearse else names)
        return self.python("export.build", *options, "--target", self._local_target(), "--out", out)

    def _local_target(self) -> str:
        """Return the --target of export.build for a build with autotuning on this machine."""
        return {"tensorrt": "local", "tensorrt_rtx": "local", "inductor": "inductor"}.get(self.setup.backend, "cpu")

    def _build_options(self, names: str) -> tuple[str, ...]:
        base = ("--base", "tiny") if self.setup.rehearse else ("--base", "sd15", "--weights", "random")
        return (*base, "--precision", self.setup.precision, "--only", names)

    def latency(self, bundles: Sequence[object]) -> tuple[str, ...]:
        return self.module("pictures", bundles, "--subject", self.setup.subject)

    def compared(self, baselines: str) -> tuple[str, ...]:
        setup, (steps, repeats) = self.setup, (1, 1) if self.setup.rehearse else (50, 10)
        # A rehearsal leaves out baselines with CUDA graphs, which need a GPU.
        names = ",".join(name for name in baselines.split(",") if not setup.rehearse or name in ("eager", "plain"))
        return self.python(
            *("benchmarks.latency", "--bundle", setup.bundle, "--backend", setup.backend, "--subject", setup.subject),
            *("--steps", steps, "--repeats", repeats, "--minutes", 4, "--context-embedding", "random"),
            *("--baselines", names or "none", "--out", f"latency_{baselines.split(',')[0]}"),
        )

    def soak(self, *options: str) -> tuple[str, ...]:
        setup = self.setup
        name = "soak_batches" if options else "soak"
        whole = setup.bundle if setup.rehearse else setup.whole
        count = ("--requests", 60 if setup.rehearse else 100, "--distinct", 4 if setup.rehearse else 24)
        usual = () if options else ("--max-batch", 1)
        return self.python(
            *("benchmarks.soak", "--bundle", whole, "--backend", setup.backend, *count, *usual, *options),
            *("--minutes", 8, "--out", name),
        )

    def sanitized(self, tool: str = "") -> tuple[str, ...]:
        command = self.python(
            "benchmarks.kernels.sanitized_launches", *(["--device", "cpu"] if self.setup.rehearse else [])
        )
        if not tool or self.setup.rehearse:
            return command
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command)

    def rtx_probe(self) -> tuple[str, ...]:
        setup = self.setup
        return self.python("benchmarks.gpu.rtx_probe", "--carried", setup.carried, "--work", setup.work)
