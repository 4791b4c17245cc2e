"""Each kind of wrong input, through the command line: one line that says what is wrong, exit code 2, nothing written.

The packages' own tests cover each check in detail; these cover the whole command.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from moma_rt.bundle.manifest import FORMAT_VERSION

BASE = "hub/SG161222/Realistic_Vision_V4.0_noVAE"
UNET = f"{BASE}/unet/config.json"
UNET_WEIGHTS = f"{BASE}/unet/diffusion_pytorch_model.safetensors"
ADAPTERS = "hub/checkpoints/attn_adapters_projectors.th"
LORA = "diverged.safetensors"
BUILD = ["build", "--base", BASE, "--vae", "hub/stabilityai/sd-vae-ft-mse", "--adapters", ADAPTERS, "--out", "new"]
BUILD += ["--mllm", "hub/KunpengSong/MoMA_llava_7b", "--vision", "hub/openai/clip-vit-large-patch14-336"]
ENROLL = ["enroll", "bundle", "photo.png", "mask.png", "--name", "car", "--out", "new.subject", "--quiet"]
GENERATE = ["generate", "bundle", "car.subject", "A car.", "--steps", "1", "--out", "new.png", "--quiet"]


def run(arguments: list[str]) -> int:
    """Run `python -m export.build` if the first argument is "build", else `moma-rt`; returns the exit code."""
    if arguments[0] == "build":
        from export.build import main

        return main(arguments[1:])
    from moma_rt.cli import entry

    return entry(arguments)


def changed(command: list[str], old: str, new: str) -> list[str]:
    """The command with one of its words replaced."""
    assert old in command
    return [new if word == old else word for word in command]


def replace(path: str, content: bytes) -> None:
    # The files are hard links to what other tests read, so they must not be written in place.
    Path(path).unlink()
    Path(path).write_bytes(content)


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    replace(path, content[: len(content) // 2])


def edit(path: str, **values: object) -> None:
    replace(path, json.dumps({**json.loads(Path(path).read_text()), **values}).encode())


def edit_sources(bundle: str) -> None:
    data = json.loads(Path(bundle, "manifest.json").read_text())
    for source in data["sources"]:
        source["sha256"] = source["sha256"][::-1]
    edit(f"{bundle}/manifest.json", base="other", sources=data["sources"])


def alter(bundle: str, group: str) -> None:
    (path,) = Path(bundle).glob(f"weights/{group}-*/weights.safetensors")
    content = path.read_bytes()
    replace(str(path), content[:-1] + bytes([content[-1] ^ 1]))


def edit_networks(bundle: str, **values: object) -> None:
    """Change the manifest's entries of all networks."""
    data = json.loads(Path(bundle, "manifest.json").read_text())
    networks = {name: {**entry, **values} for name, entry in data["networks"].items()}
    files = dict(data["files"])
    for file in values["weights"] if isinstance(values.get("weights"), list) else []:
        files[file] = {"sha256": "0" * 64, "size": Path(bundle, file).stat().st_size}
    edit(f"{bundle}/manifest.json", networks=networks, files=files)


def weights_of(group: str) -> str:
    (path,) = Path("bundle").glob(f"weights/{group}-*/weights.safetensors")
    return str(path)


class Attack:
    """An object whose pickle creates the folder `ran` when it is loaded."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("ran",)


def malicious() -> None:
    replace(ADAPTERS, pickle.dumps({"projectors": Attack(), "self_cross_attentions": {}, "llm_mapping": {}}))


def malicious_zip() -> None:
    import torch

    Path(ADAPTERS).unlink()
    torch.save({"projectors": Attack(), "self_cross_attentions": {}, "llm_mapping": {}}, ADAPTERS)


def not_a_number() -> None:
    from safetensors.torch import load, save

    tensors = load(Path(UNET_WEIGHTS).read_bytes())
    tensors["conv_out.bias"][0] = float("nan")
    replace(UNET_WEIGHTS, save(tensors))


def diverged_lora() -> None:
    import torch
    from safetensors.torch import save_file

    layer, nan = "lora_unet_conv_in", torch.full((1, 4, 3, 3), float("nan"))
    save_file({f"{layer}.lora_down.weight": nan, f"{layer}.lora_up.weight": torch.ones(16, 1, 1, 1)}, LORA)


def nothing() -> None:
    pass


def image(name: str, mode: str, size: tuple[int, int], color: int = 0) -> Callable[[], None]:
    return lambda: Image.new(mode, size, color).save(name)


SDXL = {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}
SD2 = {"cross_attention_dim": 1024, "use_linear_projection": True}
REFUSED = "contains code (posix.mkdir), not plain tensors: it was refused and nothing in it was run"
CASES = {
    "missing base": (nothing, changed(BUILD, BASE, "none"), "none does not exist"),
    "missing checkpoint file": (lambda: Path(UNET_WEIGHTS).unlink(), BUILD, "unet has no weights: looked for"),
    "missing adapters": (lambda: Path(ADAPTERS).unlink(), BUILD, "does not exist; --adapters takes"),
    "truncated checkpoint": (lambda: truncate(UNET_WEIGHTS), BUILD, "truncated"),
    "truncated adapters": (lambda: truncate(ADAPTERS), BUILD, "truncated"),
    "SDXL": (
        lambda: edit(UNET, **SDXL),
        BUILD,
        "has addition_embed_type 'text_time', as SDXL has; MoMA's adapters need",
    ),
    "SD2": (
        lambda: edit(UNET, **SD2),
        BUILD,
        "has cross_attention_dim 1024, as Stable Diffusion 2 has; MoMA's adapters",
    ),
    "adapters of another geometry": (
        nothing,
        ["build", "--base", "tiny", "--adapters", ADAPTERS, "--out", "new"],
        "(needed: adapters for UNet widths [32, 32, 64, 64], text width 64)",
    ),
    "NaN in a checkpoint": (not_a_number, BUILD, f"{UNET_WEIGHTS} has NaN in conv_out.bias"),
    "NaN in a LoRA": (
        diverged_lora,
        [*BUILD, "--lora", f"{LORA}:0.5"],
        f"{LORA} has NaN in lora_unet_conv_in.lora_down.weight",
    ),
    "malicious pickle": (malicious, BUILD, REFUSED),
    "malicious torch file": (malicious_zip, BUILD, REFUSED),
    "mask without foreground": (
        image("black.png", "L", (640, 600)),
        changed(ENROLL, "mask.png", "black.png"),
        "the mask has no foreground",
    ),
    "mask of another aspect ratio": (
        image("wide.png", "L", (512, 256), 255),
        changed(ENROLL, "mask.png", "wide.png"),
        "the mask's aspect ratio is not the photo's: the photo is 640x600, the mask 512x256",
    ),
    "empty subject name": (nothing, changed(ENROLL, "car", ""), "subject name is empty"),
    "blank subject name": (nothing, changed(ENROLL, "car", "   "), "subject name is empty"),
    "subject name of 80 words": (
        nothing,
        changed(ENROLL, "car", "car " * 79 + "car"),
        "subject name has 80 words, at most",
    ),
    "image bomb": (image("bomb.png", "1", (20000, 20000)), changed(ENROLL, "photo.png", "bomb.png"), "too large"),
    "mask bomb": (image("bomb.png", "1", (20000, 20000)), changed(ENROLL, "mask.png", "bomb.png"), "too large"),
    "strength above 2": (nothing, [*GENERATE, "--strength", "2.01"], "strength is 2.01: it must be between 0 and 2"),
    "strength below 0": (nothing, [*GENERATE, "--strength=-0.1"], "strength is -0.1: it must be between 0 and 2"),
    "steps 0": (nothing, changed(GENERATE, "1", "0"), "steps must be 1 to 999, not 0"),
    "altered bundle": (
        lambda: alter("bundle", "denoiser"),
        GENERATE,
        "weights.safetensors was altered: its SHA-256 is",
    ),
    "altered UNet": (lambda: alter("bundle", "unet"), GENERATE, "weights.safetensors was altered: its SHA-256 is"),
    "altered bundle, enrolling": (lambda: alter("bundle", "vae_encoder"), ENROLL, "weights.safetensors was altered"),
    "missing weights": (lambda: Path(weights_of("unet")).unlink(), GENERATE, "is missing; build the bundle again"),
    "truncated weights": (lambda: truncate(weights_of("unet")), GENERATE, "bytes, the manifest says"),
    "weights outside of the bundle": (
        lambda: edit_networks("bundle", weights=["../photo.png"]),
        GENERATE,
        "unsafe manifest: path '../photo.png' leaves its folder",
    ),
    "weights that are a number": (lambda: edit_networks("bundle", weights=3), GENERATE, "manifest.json is malformed"),
    "a bundle without graphs": (
        lambda: edit_networks("bundle", onnx=None, lowered=None),
        GENERATE,
        "the bundle has neither ONNX graphs nor engines",
    ),
    "newer bundle": (
        lambda: edit("bundle/manifest.json", format_version=FORMAT_VERSION + 1),
        GENERATE,
        f"has bundle format {FORMAT_VERSION + 1}; this moma-rt reads format {FORMAT_VERSION}: upgrade it",
    ),
    "older bundle": (
        lambda: edit("bundle/manifest.json", format_version=FORMAT_VERSION - 1),
        GENERATE,
        f"has bundle format {FORMAT_VERSION - 1}; this moma-rt reads format {FORMAT_VERSION}: build the bundle again",
    ),
    "subject of another base": (lambda: edit_sources("bundle"), GENERATE, "base 'other'"),
}


@pytest.fixture(scope="module")
def originals(hub, tiny_bundle, goldens, tmp_path_factory) -> Path:
    """The commands' inputs: checkpoints, a bundle, a subject enrolled with it, a photo and its mask."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(hub, folder / "hub", copy_function=os.link)
    shutil.copytree(tiny_bundle, folder / "bundle", copy_function=os.link)
    shutil.copy(goldens / "context" / "image.png", folder / "photo.png")
    shutil.copy(goldens / "context" / "mask.png", folder / "mask.png")
    # Paths are absolute here; the tests give relative ones in a working folder of their own.
    given = {"bundle": "bundle", "photo.png": "photo.png", "mask.png": "mask.png", "new.subject": "car.subject"}
    command = [str(folder / given[word]) if word in given else word for word in ENROLL]
    assert run(command) == 0
    return folder


@pytest.fixture
def given(originals, tmp_path, monkeypatch) -> Path:
    """A working folder with hard links to `originals`; replacing a file in it leaves the original alone."""
    shutil.copytree(originals, tmp_path / "given", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "given")
    return tmp_path / "given"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its inode and modification time."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize(("prepare", "command", "said"), CASES.values(), ids=CASES)
def test_one_line_exit_code_2_and_nothing_written(given, capfd, prepare, command, said):
    prepare()
    before = listing(given)
    assert run(command) == 2
    out, err = capfd.readouterr()
    program = "export.build" if command[0] == "build" else "moma-rt"
    assert out == ""
    assert err.startswith(f"{program}: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert said in err
    assert "Traceback" not in err
    assert listing(given) == before


def test_the_attack_works_on_a_careless_reader(given):
    malicious()
    pickle.loads(Path(ADAPTERS).read_bytes())
    assert Path("ran").is_dir()


def test_a_prompt_over_77_tokens_is_cut_with_a_warning(given, capfd):
    prompt = "A car " + "on a beach " * 30 + "at night"
    assert run(changed(GENERATE, "A car.", prompt)) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("moma-rt: warning: ")
    assert err.count("\n") == 1
    assert "77 fit" in err
    assert "cut: " in err
    assert "at night" in err
    assert Path("new.png").is_file()


@pytest.mark.parametrize("name", ["SDXL", "subject of another base"])
def test_in_a_process_of_its_own(given, repository, name):
    """The line is all that is printed: no output of imported libraries, no traceback at exit."""
    prepare, command, said = CASES[name]
    prepare()
    before = listing(given)
    module, arguments = ("export.build", command[1:]) if command[0] == "build" else ("moma_rt", command)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    ran = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert said in ran.stderr
    assert listing(given) == before
