"""Fixtures that every package's tests share, and the skipping of tests whose device or library is not here."""

import dataclasses
import importlib.util
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import MappingProxyType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _has_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _has_tensorrt() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
def hub(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints behind `goldens`, unpacked: folders named as on the hub, and checkpoints/."""
    folder = tmp_path_factory.mktemp("goldens")
    with tarfile.open(goldens / "hub.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "hub"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the synthetic checkpoint; it takes the better part of a minute, so nothing may change it."""
    pytest.importorskip("diffusers")
    from export.build import main

    root = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["--base", "tiny", "--out", str(root)]) == 0
    return root


def _build_small(out: Path, only: str, *options: str) -> Path:
    """A bundle of a synthetic checkpoint whose UNet has few blocks, so that inductor compiles it in half a minute."""
    pytest.importorskip("diffusers")
    from export.build import main
    from export.checkpoints import presets

    unet = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
    unet |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (32, 64)}
    small = dataclasses.replace(presets.TINY, unet=MappingProxyType({**presets.TINY.unet, **unet}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "TINY", small)
        assert main(["--base", "tiny", "--only", only, *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def small_bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of one checkpoint: one that enrolls, on ONNX Runtime, and one that makes pictures of a context
    embedding, with graphs and with inductor's engines for a CPU, in a folder whose name has a space. Nothing may change
    them.
    """
    root, pictures = tmp_path_factory.mktemp("bundles"), "text_encoder,denoiser,vae_decoder,context_projector"
    enrolling = _build_small(root / "enrolling", f"{pictures},vae_encoder,subject_encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.targets.local_device", lambda: None)
        return enrolling, _build_small(root / "making pictures", pictures, "--target", "cpu,inductor")


@pytest.fixture(scope="session")
def small_gpu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two networks, their graphs and inductor's engines for this machine's GPU, in fp16. Nothing may change
    it.
    """
    root = tmp_path_factory.mktemp("bundles") / "of a gpu"
    return _build_small(root, "denoiser,vae_decoder", "--target", "cpu,inductor")


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, without the GPU that it may have."""
    for module in ("engines.targets", "export.compare", "moma_rt.backends", "moma_rt.backends.selection"):
        monkeypatch.setattr(f"{module}.local_device", lambda: None)


@pytest.fixture(scope="session")
def large_goldens() -> Path:
    """The large golden set, kept beside the repository; tests that use it are skipped where it is not."""
    folder = REPOSITORY.parent / "shared" / "goldens"
    if not (folder / "context" / "trace.npz").is_file():
        pytest.skip("the large golden set is not beside the repository")
    return folder


def _build_original(hub: Path, out: Path, *options: str) -> Path:
    pytest.importorskip("diffusers")
    from export.build import main

    arguments = ["--base", hub / "SG161222/Realistic_Vision_V4.0_noVAE", "--vae", hub / "stabilityai/sd-vae-ft-mse"]
    arguments += ["--adapters", hub / "checkpoints/attn_adapters_projectors.th"]
    arguments += ["--mllm", hub / "KunpengSong/MoMA_llava_7b", "--vision", hub / "openai/clip-vit-large-patch14-336"]
    assert main([*map(str, arguments), *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def golden_bundle(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoints behind `goldens`."""
    return _build_original(hub, tmp_path_factory.mktemp("bundles") / "golden")


@pytest.fixture(scope="session")
def large_golden_bundle(large_goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoints behind `large_goldens`."""
    return _build_original(large_goldens / "hub", tmp_path_factory.mktemp("bundles") / "large")


@pytest.fixture(scope="session")
def golden_bundle_fp16(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoints behind `goldens`, in fp16 where that is safe."""
    out = tmp_path_factory.mktemp("bundles") / "golden-fp16"
    return _build_original(hub, out, "--precision", "fp16", "--plugins", "off")


@pytest.fixture(scope="session")
def large_golden_bundle_fp16(large_goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoints behind `large_goldens`, in fp16 where that is safe."""
    out = tmp_path_factory.mktemp("bundles") / "large-fp16"
    return _build_original(large_goldens / "hub", out, "--precision", "fp16", "--plugins", "off")
