"""The build's command line: its options, one-line errors, and progress."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export import bundling
from export.build import main, parser
from export.checkpoints import NETWORK_ROLES, roles_for
from export.networks import NETWORKS
from export.progress import Progress
from moma_rt.bundle.engines import Device
from moma_rt.bundle.manifest import Bundle


@pytest.fixture
def calls(monkeypatch, tiny_bundle):
    """Replaces the export; returns the checkpoint, the networks and the folder of every call."""
    made = []

    def build(checkpoint, plan, out, report, shared):
        made.append((checkpoint, plan.names, out))
        for name in plan.names:
            report(name, "kept")
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr(bundling, "build_bundle", build)
    return made


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("export.build: error: ")
    assert err.count("\n") == 1
    return err


def test_all_networks_by_default(calls, capsys):
    assert main(["--base", "tiny"]) == 0
    ((checkpoint, names, out),) = calls
    assert names == tuple(NETWORKS)
    assert out == Path("bundles/tiny")
    assert checkpoint.base == "tiny"
    printed = capsys.readouterr()
    assert printed.out.startswith("bundles/tiny: text_encoder, ")
    assert printed.out.endswith(" MB\n")
    assert printed.err.splitlines() == [f"{name:<18} kept" for name in NETWORKS]


def test_the_folder_is_named_after_the_base(calls, original_base):
    assert main(["--base", f"{original_base}/", "--weights", "random", "--only", "text_encoder"]) == 0
    assert main(["--base", "sd15", "--weights", "random", "--only", "text_encoder", "--out", "x/y"]) == 0
    assert [call[2] for call in calls] == [Path("bundles/Realistic_Vision_V4.0_noVAE"), Path("x/y")]


@pytest.fixture
def original_base(hub):
    return hub / "SG161222/Realistic_Vision_V4.0_noVAE"


def test_seed(calls):
    for seed in ("0", "0", "1"):
        assert main(["--base", "tiny", "--only", "text_encoder", "--seed", seed]) == 0
    first, again, other = (call[0].text_encoder.sha256 for call in calls)
    assert first == again != other


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("denoiser", ("denoiser",)),
        ("vae_decoder, text_encoder ,,text_encoder", ("text_encoder", "vae_decoder")),
        ("language_model", ("language_model",)),
    ],
)
def test_only(calls, only, names):
    assert main(["--base", "tiny", "--only", only]) == 0
    checkpoint, found, _ = calls[0]
    assert found == names
    assert checkpoint.roles >= roles_for(names)
    # Only the language model reads more than its own roles: its sizes need the vision encoder's config.
    assert checkpoint.roles - roles_for(names) <= {"vision"}
    assert (checkpoint.vision is not None) == (checkpoint.language is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_what_it_needs(calls, name):
    from export.geometry import geometry_of

    assert main(["--base", "tiny", "--only", name]) == 0
    checkpoint = calls[0][0]
    NETWORKS[name].spec(geometry_of(checkpoint))
    assert {c.role for c in checkpoint.components} >= NETWORK_ROLES[name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--base tiny --only unet", "no network unet; there are: text_encoder, vae_encoder"),
        ("--base tiny --only denoiser,unet,vae", "no network unet, vae; there are"),
        ("--base tiny --only ,", "is named; there are"),
        ("--base tiny --weights some/folder", "takes no --weights"),
        ("--base tiny --adapters none.th", "none.th does not exist"),
        ("--base tiny --mllm none", "none is not a folder; --mllm takes"),
        ("--base tiny --vision none", "none is not a folder; --vision takes"),
        ("--base tiny --vae none", "none does not exist; --vae takes"),
        ("--base tiny --lora none.safetensors:0.5", "none.safetensors does not exist"),
        ("--base tiny --lora none.safetensors:nan", "the scale must be a finite number"),
        ("--base sd15 --weights none", "none does not exist"),
        ("--base none", "none does not exist"),
        ("--base {base} --vae {vae}", "--mllm"),
        ("--base {base} --vae {vae} --only denoiser", "--adapters"),
        ("--base {base} --vae {vae} --mllm {mllm} --vision {vision}", "--adapters"),
        ("--base {base} --adapters {adapters} --only language_model", "--mllm"),
        ("--base {base} --weights random --out photo.png", "photo.png: cannot be written"),
        ("--base tiny --out photo.png/bundle", "photo.png/bundle: cannot be written"),
        ("--base tiny --out /proc/none", "/proc/none: cannot be written"),
    ],
)
def test_one_line_and_nothing_written(hub, tmp_path, monkeypatch, capsys, arguments, said):
    places = {
        "base": hub / "SG161222/Realistic_Vision_V4.0_noVAE",
        "vae": hub / "stabilityai/sd-vae-ft-mse",
        "mllm": hub / "KunpengSong/MoMA_llava_7b",
        "vision": hub / "openai/clip-vit-large-patch14-336",
        "adapters": hub / "checkpoints/attn_adapters_projectors.th",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_text("a file")
    assert main(arguments.format(**places).split()) == 2
    assert said in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]
    assert (tmp_path / "photo.png").read_text() == "a file"


def test_loras_are_named_in_the_bundle(exports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(128, 1)},
        "style.safetensors",
    )
    lora = ["--lora", "style.safetensors", "--lora", "style.safetensors:-0.5"]
    assert main(["--base", "tiny", "--only", "text_encoder", *lora]) == 0
    manifest = Bundle.open(tmp_path / "bundles" / "tiny+style+style").manifest
    assert manifest.base == "tiny+style+style"
    source = next(source for source in manifest.sources if source.role == "text_encoder")
    assert source.name == "random weights, seed 0 + style.safetensors:1 + style.safetensors:-0.5"


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundling, "build_bundle", interrupt)
    assert main(["--base", "tiny"]) == 130
    assert capsys.readouterr() == ("", "export.build: interrupted\n")


@pytest.mark.parametrize("arguments", [[], ["--only", "denoiser"], ["--base", "tiny", "--seed", "x"], ["--what"]])
def test_arguments_that_cannot_be_parsed(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "python -m export.build: error: " in capsys.readouterr().err.splitlines()[-1]


def test_help_needs_no_torch(repository):
    code = (
        "import sys, export.build as b; b.parser().format_help(); print('torch' in sys.modules, 'onnx' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=repository) == "False False\n"
    text = parser().format_help()
    for option in ("--base", "--weights", "--adapters", "--mllm", "--vision", "--vae", "--only", "--out", "--seed"):
        assert option in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_is_a_line_a_network():
    stream = io.StringIO()
    with Progress(2, stream) as progress:
        progress.report("a", "checking")
        progress.report("a", "kept")
        progress.report("b", "tracing")
        progress.report("b", "built in 1.0 s")
    assert stream.getvalue() == f"{'a':<18} kept\n{'b':<18} built in 1.0 s\n"


def test_progress_on_a_terminal_counts():
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.report("a", "tracing")
        assert "a: tracing" in stream.getvalue()
        assert "0/2" in stream.getvalue()
        progress.report("a", "kept")
        assert "1/2" in stream.getvalue()


def test_a_second_base_reuses_what_does_not_depend_on_it(exports, tmp_path, capsys):
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora = tmp_path / "style.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(1, 64), f"{layer}.lora_up.weight": torch.ones(128, 1)}, lora)
    names = ["--base", "tiny", "--only", "text_encoder,vae_decoder"]
    assert main([*names, "--out", str(tmp_path / "first")]) == 0
    capsys.readouterr()
    assert main([*names, "--lora", str(lora), "--out", str(tmp_path / "second")]) == 0
    said = {line.split()[0]: line.split()[1] for line in capsys.readouterr().err.splitlines()}
    assert said == {"text_encoder": "built", "vae_decoder": "kept"}
    first, second = (Bundle.open(tmp_path / name) for name in ("first", "second"))
    for name, same in (("vae_decoder", True), ("text_encoder", False)):
        entries = [(bundle, bundle.network(name)) for bundle in (first, second)]
        for file in ("onnx", "weights"):
            paths = [bundle.path("".join(getattr(entry, file))) for bundle, entry in entries]
            assert paths[0].samefile(paths[1]) == same
    shared = tmp_path / "elsewhere"
    assert main([*names, "--out", str(tmp_path / "third"), "--store", str(shared)]) == 0
    assert {kind: len(list((shared / kind).iterdir())) for kind in ("networks", "weights")} == {
        "networks": 2,
        "weights": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--base tiny --only denoiser --skip denoiser", "--only and --skip exclude each other"),
        ("--base tiny --skip unet", "--skip 'unet': no network unet; there are: text_encoder"),
        (f"--base tiny --skip {','.join(NETWORKS)}", "leaves no network"),
        ("--base tiny --target sm61", "--target 'sm61': no target sm61; there are: cpu, rtx, local, inductor, sm75"),
        ("--base tiny --target local", "--target local: this machine has no NVIDIA GPU"),
        ("--base tiny --target sm80,local", "--target local: this machine has no NVIDIA GPU"),
        ("--base tiny --store /proc/none", "--store /proc/none: cannot be written"),
        (
            "--base tiny --target inductor --mllm-precision int4",
            "--target inductor does not support int4 weights (of the language_model): give --mllm-precision fp16",
        ),
        ("--base tiny --target cpu,inductor --mllm-precision int8", "--target inductor does not support int8 weights"),
    ],
)
def test_invalid_targets_and_options(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("engines.targets.local_device", lambda: None)
    assert main([*arguments.split(), "--out", str(tmp_path / "bundle")]) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "bundle" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "networks", "language"),
    [
        ("", "fp32", "fp32"),
        ("--target sm86", "fp16", "fp16"),
        ("--target sm86 --precision bf16", "bf16", "bf16"),
        ("--precision fp16 --mllm-precision int8", "fp16", "int8"),
        ("--target cpu --mllm-precision int4", "fp32", "int4"),
        ("--target cpu,sm86 --precision fp32", "fp32", "fp32"),
        ("--target sm80", "fp16", "fp16"),
        ("--target cpu,sm90 --precision bf16", "bf16", "bf16"),
        ("--target inductor", "fp32", "fp32"),
        ("--target inductor,cpu --precision bf16", "bf16", "bf16"),
        ("--target inductor,sm86", "fp16", "fp16"),
        ("--target inductor --mllm-precision int4 --skip language_model", "fp32", "int4"),
    ],
)
def test_precisions(monkeypatch, tiny_bundle, arguments, networks, language):
    plans = []

    def build(checkpoint, plan, out, report, shared):
        plans.append(plan)
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("engines.targets.local_device", lambda: None)
    monkeypatch.setattr(bundling, "build_bundle", build)
    monkeypatch.setattr("export.build.build_engines", lambda *_: Bundle.open(tiny_bundle))
    monkeypatch.setattr("export.inductor_export.check_target", lambda target: None)
    monkeypatch.setattr("export.inductor_export.build_packages", lambda *_: Bundle.open(tiny_bundle))
    assert main(["--base", "tiny", *arguments.split()]) == 0
    found = plans[0].precisions
    assert (found.networks.value, found.language.value) == (networks, language)
    assert found.of("context_projector").value == "fp32"


@pytest.mark.parametrize(
    ("arguments", "device", "graphs"),
    [
        ("", None, True),
        ("--target cpu", None, True),
        ("--target inductor", None, False),
        ("--target cpu,inductor", None, True),
        ("--target inductor", 90, False),
        ("--target inductor,sm86", None, True),
        ("--target inductor,sm80", 90, True),
        ("--target inductor,local", 90, True),
        ("--target rtx", None, True),
        ("--target sm90", None, True),
    ],
)
def test_graphs_are_exported_if_a_target_needs_them(monkeypatch, tiny_bundle, arguments, device, graphs):
    """A TensorRT engine that is built later on another machine needs a graph as well."""
    plans = []

    def build(checkpoint, plan, out, report, shared):
        plans.append(plan)
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("engines.targets.local_device", lambda: None if device is None else Device("a GPU", device))
    monkeypatch.setattr(bundling, "build_bundle", build)
    monkeypatch.setattr("export.build.build_engines", lambda *_: Bundle.open(tiny_bundle))
    monkeypatch.setattr("export.inductor_export.check_target", lambda target: None)
    monkeypatch.setattr("export.inductor_export.build_packages", lambda *_: Bundle.open(tiny_bundle))
    assert main(["--base", "tiny", *arguments.split()]) == 0
    assert plans[0].graphs == graphs


EVERYWHERE = (80, 86, 87, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("arguments", "device", "kernels"),
    [
        ("", None, ()),
        ("--target cpu", None, ()),
        ("--precision fp16", None, EVERYWHERE),
        ("--target cpu --precision bf16", None, EVERYWHERE),
        ("--precision fp16 --only vae_decoder", None, ()),
        ("--target rtx", None, ()),
        ("--target sm80", None, (80,)),
        ("--target sm103,sm86,sm90", None, (90, 103)),
        ("--target sm80 --precision fp32", None, ()),
        ("--target sm87,local", 90, (87, 90)),
        ("--target sm90", 90, (90,)),
        ("--target rtx,local", 90, (90,)),
        ("--target sm80 --plugins off", None, None),
        ("--precision fp16 --plugins off", None, None),
        ("--target inductor --precision fp16", None, ()),
        ("--target inductor", 90, ()),
        ("--target inductor,local", 90, (90,)),
    ],
)
def test_for_which_devices_kernels_are_compiled(monkeypatch, tiny_bundle, capsys, arguments, device, kernels):
    plans, built = [], []

    def build(checkpoint, plan, out, report, shared):
        plans.append(plan)
        return Bundle.open(tiny_bundle)

    def build_engines(out, plan, shared, report):
        built.append(plan)
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("engines.targets.local_device", lambda: None if device is None else Device("a GPU", device))
    monkeypatch.setattr(bundling, "build_bundle", build)
    monkeypatch.setattr("export.build.build_engines", build_engines)
    monkeypatch.setattr("export.inductor_export.check_target", lambda target: None)
    monkeypatch.setattr("export.inductor_export.build_packages", lambda *_: Bundle.open(tiny_bundle))
    assert main(["--base", "tiny", *arguments.split(), "--out", "some/bundle"]) == 0
    assert plans[0].kernels == kernels
    assert all(plan.plugins == (kernels is not None) for plan in built)
    # A note says how to build for the other devices later; they are no targets of this build's engines.
    named = {name for name in arguments.replace(",", " ").split() if name in ("sm80", "sm87", "sm90", "sm103")}
    later = sorted(named - {f"sm{device}"})
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert sorted(notes) == [
        f"{name:<18} note: copy some/bundle to such a device and run there: "
        "python -m engines.build BUNDLE --target local"
        for name in later
    ]
    assert not {f"sm{c}" for plan in built for target in plan.targets for c in target.capabilities} & set(later)
