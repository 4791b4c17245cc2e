"""Compiling for a GPU that this machine lacks: what is refused, how child processes end, and the packages.

Packages need PyPI's build of PyTorch, with CUDA; their tests are skipped if PyTorch is a CPU build.
"""

import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from export.build import main
from export.cross import compiling
from export.cross.compiling import check_cross, cross_compile
from export.cross.devices import DEVICES
from export.cross.stubs import build_stubs
from export.networks import NETWORKS
from export.packages import PackageRequest
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.errors import BundleError, InputError

COMMAND = ["--base", "tiny", "--target", "inductor:sm90"]
GENERATION_NETWORKS = "text_encoder,context_projector,vae_decoder"
HERE = [capability for capability, facts in DEVICES.items() if platform.machine() in facts.machines]


@pytest.fixture
def cuda_version(monkeypatch):
    """Make PyTorch report that it is a build with CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_build_for_cpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main([*COMMAND, "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err.splitlines()
    version = torch.__version__.split("+")[0]
    assert said == [
        f"export.build: error: inductor sm90: PyTorch {torch.__version__} is a CPU build, which cannot compile for "
        f"GPUs: install PyPI's own, pip install torch=={version} (5 GB with CUDA)"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_capability(cuda_version, capsys, tmp_path):
    with pytest.raises(InputError, match="inductor sm75: no such device is known; known are sm80,sm86,"):
        check_cross(75)
    assert main(["--base", "tiny", "--target", "inductor:sm75", "--out", str(tmp_path / "a")]) == 2
    assert "no target inductor:sm75; there are: cpu, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_triton(cuda_version, monkeypatch):
    monkeypatch.setattr(compiling, "is_installed", lambda name: False)
    with pytest.raises(
        InputError, match=r"^inductor sm90: the Python package triton is not installed; pip install tri"
    ):
        check_cross(90)


def test_no_compiler(cuda_version, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"^inductor sm90: no C\+\+ compiler: cc is not on the path; install g\+\+$"):
        check_cross(90)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            r"was killed, most likely because this machine's \d+ GB of memory ran ",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process that compiled it was ended by SIGSEGV$"),
        ("raise ValueError('no such\\nthing')", "PyTorch [^ ]+ cannot compile it: ValueError: no such thing$"),
        ("sys.exit(3)", "cannot compile it: exit code 3$"),
        ("done({'error': 'a network: no room'})", "^a network: no room$"),
        ("done({'error': 'no room'})", "^a network: no room$"),
    ],
)
def test_how_a_process_ends(monkeypatch, tmp_path, code, said):
    head = (
        "import json, os, pathlib, signal, sys\ndone = lambda r: pathlib.Path(sys.argv[2]).write_text(json.dumps(r))\n"
    )
    (tmp_path / "a_worker.py").write_text(f"{head}{code}\n")
    monkeypatch.setattr(compiling, "_WORKER", "a_worker")
    with pytest.raises(BundleError, match=said) as caught:
        compiling._run({}, {"PYTHONPATH": str(tmp_path)}, "a network")
    assert str(caught.value).startswith("a network: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def compile_with_results(monkeypatch, tiny_checkpoint, tiny_geometry, tmp_path):
    """Returns a function that runs `cross_compile` with the given results of its two child processes."""
    monkeypatch.setattr(compiling, "check_cross", lambda capability: (None, None))
    monkeypatch.setattr(compiling, "build_stubs", lambda *_: {})
    request = PackageRequest(tiny_checkpoint, NETWORKS["denoiser"], tiny_geometry, Precision.FP16, 90, False)

    def compile_package(chosen, asked):
        with zipfile.ZipFile(tmp_path / "engine.pt2", "w") as package:
            package.writestr("moma/weights.json", json.dumps({"tensors": {"unet.a": [], "unet.b": []}}))
        monkeypatch.setattr(compiling, "_run", lambda job, *_: chosen if "compile" in job else asked)
        cross_compile(request, tmp_path)

    return compile_package


def test_code_that_reads_only_weights(compile_with_results):
    compile_with_results(3, ["unet.b"])


def test_code_that_reads_another_tensor(compile_with_results):
    with pytest.raises(BundleError, match=r"^denoiser: its code asks for 1 tensors that are not weights of the .* lif"):
        compile_with_results(3, ["unet.a", "lifted_0"])


def test_kernels_that_were_not_chosen_by_rule(compile_with_results):
    with pytest.raises(BundleError, match="^denoiser: PyTorch .* compiled kernels that were not chosen by rule$"):
        compile_with_results(0, ["unet.a"])


def test_a_failing_worker_writes_no_result(tmp_path):
    """Runs the real worker on a package that does not exist."""
    (tmp_path / "job.json").write_text(json.dumps({"constants": str(tmp_path / "none.pt2")}))
    command = [sys.executable, "-m", "export.cross.worker", str(tmp_path / "job.json"), str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()


LOAD = """
import sys
from moma_rt.backends.inductor import InductorBackend
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.engines import Device
bundle = Bundle.open(sys.argv[1])
backend = InductorBackend(Device("a stub", int(sys.argv[2])))
for engine in bundle.manifest.engines:
    entry = bundle.network(engine.network)
    network = backend.load(entry.spec, bundle.path(engine.file), [bundle.path(file) for file in entry.weights])
    print(engine.network, len(network.weights))
"""


def loaded(root: Path, capability: int = 90) -> dict[str, int]:
    """Load each package of a bundle on a stubbed device; return how many weights each gets."""
    facts, tools = check_cross(capability)
    with tempfile.TemporaryDirectory() as folder:
        environment = build_stubs(facts, tools, Path(folder))
        command = [sys.executable, "-c", LOAD, str(root), str(capability)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}


@pytest.fixture(scope="session")
def cross_bundle(cuda_build, tmp_path_factory):
    root = tmp_path_factory.mktemp("cross") / "a bundle"
    assert main([*COMMAND, "--only", GENERATION_NETWORKS, "--out", str(root)]) == 0
    return root


def test_packages_for_a_gpu_that_this_machine_lacks(cross_bundle):
    bundle = Bundle.open(cross_bundle)
    engines = {engine.network: engine for engine in bundle.manifest.engines}
    assert set(engines) == set(GENERATION_NETWORKS.split(","))
    for engine in engines.values():
        assert (engine.version, engine.capabilities, engine.measured) == (torch.__version__, (90,), False)
        with zipfile.ZipFile(bundle.path(engine.file)) as package:
            (notes,) = (json.loads(package.read(n)) for n in package.namelist() if n.endswith("wrapper_metadata.json"))
            (code,) = (package.read(n) for n in package.namelist() if n.endswith(".so"))
        assert notes["AOTI_COMPUTE_CAPABILITY"] == "90"
        assert "AVX" not in notes["AOTI_CPU_ISA"]
        assert b"sm_90" in code, "the kernels are inside"


def test_the_runtime_finds_every_weight_that_a_package_reads(cross_bundle):
    bundle = Bundle.open(cross_bundle)
    counts = loaded(cross_bundle)
    for engine in bundle.manifest.engines:
        with zipfile.ZipFile(bundle.path(engine.file)) as package:
            weights = json.loads(package.read("moma/weights.json"))["tensors"]
        assert 0 < counts[engine.network] <= len(weights)


def test_packages_are_kept(cross_bundle, capsys):
    assert main([*COMMAND, "--only", GENERATION_NETWORKS, "--out", str(cross_bundle)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "inductor sm90" in line]
    assert [line.split(maxsplit=1)[1] for line in said] == ["kept for inductor sm90"] * 3


@pytest.mark.usefixtures("cuda_build")
def test_a_failed_compilation_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "to_json", lambda request: {"network": "no such"})
    assert main([*COMMAND, "--only", "context_projector", "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"export.build: error: context_projector: PyTorch {torch.__version__} cannot compile it: Key"
    )
    assert list((tmp_path / "a" / "engines").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_build")
def test_every_network(tmp_path):
    root = tmp_path / "all"
    assert main([*COMMAND, "--out", str(root)]) == 0
    assert set(loaded(root)) == set(NETWORKS)


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("capability", HERE)
def test_every_capability(tmp_path, capability):
    root = tmp_path / "a"
    target = f"inductor:sm{capability}"
    assert main(["--base", "tiny", "--only", "vae_encoder", "--target", target, "--out", str(root)]) == 0
    assert set(loaded(root, capability)) == {"vae_encoder"}
