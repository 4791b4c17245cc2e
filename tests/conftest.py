"""Fixtures shared by all packages' tests; tests whose device or library is missing are skipped."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.sharing import SharedFolders
from tests.torchlib import read_once

REPOSITORY = Path(__file__).resolve().parents[1]
# Files of half a minute or more run first, so that no worker process is left alone with one of them. Those that share a
# bundle stand apart: a worker would wait for the other one to build it.
SLOW_FILES = (
    "test_parity.py",
    "moma_rt/test_runtime_inductor.py",
    "benchmarks/gpu/test_lease.py",
    "engines/test_rtx_bundle.py",
    "test_killed.py",
    "test_precision.py",
    "export/test_packages.py",
    "benchmarks/latency/test_original.py",
    "moma_rt/test_tiny_bundle.py",
    "kernels/test_dispatch.py",
    "test_windows.py",
    "export/test_inductor_export.py",
    "export/test_streaming.py",
    "benchmarks/latency/test_command.py",
    "benchmarks/soak/test_command.py",
    "kernels/test_ptx.py",
    "moma_rt/schedulers/test_solvers.py",
    "moma_rt/backends/test_inductor.py",
)


def _has_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _has_tensorrt() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several worker processes: threads of ONNX Runtime and OpenMP that wait take a core."""
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = OneThread


def _place_in_run(item: pytest.Item) -> int:
    name = item.path.relative_to(REPOSITORY / "tests").as_posix()
    return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place_in_run)
    requirements = (
        ("gpu", _has_gpu, "needs an NVIDIA GPU"),
        ("tensorrt", _has_tensorrt, "needs tensorrt or tensorrt_rtx"),
    )
    for marker, available, reason in requirements:
        marked = [item for item in items if item.get_closest_marker(marker) is not None]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The committed outputs of the original implementation; tests/goldens/README.md says what they hold."""
    return REPOSITORY / "tests" / "goldens"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedFolders]:
    """Folders that are built once per run. An error at the end names the files in them that tests changed."""
    folders = SharedFolders(tmp_path_factory)
    yield folders
    assert folders.changed() == []


@pytest.fixture(scope="session")
def hub(goldens: Path, shared: SharedFolders) -> Path:
    """The checkpoints behind `goldens`, unpacked: folders named as on the hub, and checkpoints/."""

    def unpack(folder: Path) -> None:
        with tarfile.open(goldens / "hub.tar.xz") as archive:
            archive.extractall(folder, filter="data")

    return shared.build("goldens", unpack) / "hub"


def _build(out: Path, *arguments: object) -> None:
    pytest.importorskip("diffusers")
    from export.build import main

    read_once()
    assert main([*map(str, arguments), "--out", str(out)]) == 0


@pytest.fixture(scope="session")
def tiny_bundle(shared: SharedFolders) -> Path:
    """The bundle of the synthetic checkpoint."""
    return shared.build("tiny", lambda out: _build(out, "--base", "tiny"))


# Four attention layers on two grids: inductor compiles it in half a minute.
_SMALL_UNET = MappingProxyType(
    {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
    }
)
# All grids and kinds of blocks of the tiny UNet, with 10 of its 16 attention layers.
_SHALLOW_UNET = MappingProxyType({"layers_per_block": 1})


def _build_changed(out: Path, unet: Mapping[str, object], *options: str) -> None:
    """Build a bundle of the synthetic checkpoint with one text layer and some of its UNet's settings changed."""
    pytest.importorskip("diffusers")
    from export.checkpoints import presets

    text = MappingProxyType({**presets.TINY.text_encoder, "num_hidden_layers": 1})
    changed = dataclasses.replace(presets.TINY, text_encoder=text, unet=MappingProxyType({**presets.TINY.unet, **unet}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "TINY", changed)
        _build(out, "--base", "tiny", *options)


@pytest.fixture(scope="session")
def small_bundles(shared: SharedFolders) -> tuple[Path, Path]:
    """Two bundles of one checkpoint: one to enroll on ONNX Runtime, one to generate from a context embedding.

    The second has ONNX graphs and inductor engines for a CPU; its folder's name has a space.
    """
    pictures = "text_encoder,denoiser,vae_decoder,context_projector"

    def build(folder: Path) -> None:
        _build_changed(folder / "enrolling", _SMALL_UNET, "--only", f"{pictures},vae_encoder,subject_encoder")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engines.targets.local_device", lambda: None)
            _build_changed(folder / "making pictures", _SMALL_UNET, "--only", pictures, "--target", "cpu,inductor")

    folder = shared.build("small", build)
    return folder / "enrolling", folder / "making pictures"


@pytest.fixture(scope="session")
def small_gpu_bundle(shared: SharedFolders) -> Path:
    """An fp16 bundle of two networks, with ONNX graphs and inductor engines for this machine's GPU."""
    options = ("--only", "denoiser,vae_decoder", "--target", "cpu,inductor")
    return shared.build("of a gpu", lambda out: _build_changed(out, _SMALL_UNET, *options))


@pytest.fixture(scope="session")
def rtx_bundle(shared: SharedFolders) -> Path:
    """A bundle of all networks, with engines of TensorRT-RTX for sm86, sm89 and sm120; the language model is int4."""
    options = ("--target", "sm86,sm89,sm120", "--mllm-precision", "int4")
    return shared.build("rtx", lambda out: _build_changed(out, _SHALLOW_UNET, *options))


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide this machine's GPU, if it has one."""
    for module in ("engines.targets", "export.compare", "moma_rt.backends", "moma_rt.backends.selection"):
        monkeypatch.setattr(f"{module}.local_device", lambda: None)


@pytest.fixture(scope="session")
def large_goldens() -> Path:
    """The large golden set, kept beside the repository; tests that use it are skipped without it."""
    folder = REPOSITORY.parent / "shared" / "goldens"
    if not (folder / "context" / "trace.npz").is_file():
        pytest.skip("the large golden set is not beside the repository")
    return folder


def _build_original(out: Path, hub: Path, *options: str) -> None:
    arguments = ["--base", hub / "SG161222/Realistic_Vision_V4.0_noVAE", "--vae", hub / "stabilityai/sd-vae-ft-mse"]
    arguments += ["--adapters", hub / "checkpoints/attn_adapters_projectors.th"]
    arguments += ["--mllm", hub / "KunpengSong/MoMA_llava_7b", "--vision", hub / "openai/clip-vit-large-patch14-336"]
    _build(out, *arguments, *options)


@pytest.fixture(scope="session")
def golden_bundle(hub: Path, shared: SharedFolders) -> Path:
    """The bundle of the checkpoints behind `goldens`."""
    return shared.build("golden", lambda out: _build_original(out, hub))


@pytest.fixture(scope="session")
def large_golden_bundle(large_goldens: Path, shared: SharedFolders) -> Path:
    """The bundle of the checkpoints behind `large_goldens`."""
    return shared.build("large", lambda out: _build_original(out, large_goldens / "hub"))


_FP16 = ("--precision", "fp16", "--plugins", "off")


@pytest.fixture(scope="session")
def golden_bundle_fp16(hub: Path, shared: SharedFolders) -> Path:
    """The bundle of the checkpoints behind `goldens`, in fp16 where that is safe."""
    return shared.build("golden-fp16", lambda out: _build_original(out, hub, *_FP16))


@pytest.fixture(scope="session")
def large_golden_bundle_fp16(large_goldens: Path, shared: SharedFolders) -> Path:
    """The bundle of the checkpoints behind `large_goldens`, in fp16 where that is safe."""
    return shared.build("large-fp16", lambda out: _build_original(out, large_goldens / "hub", *_FP16))
