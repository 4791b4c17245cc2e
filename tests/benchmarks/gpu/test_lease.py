"""The lease command: what it refuses, which steps it lists, and rehearsals of whole calls on this CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu import lease, plan
from benchmarks.gpu.lease import main
from benchmarks.gpu.plan import CALLS, Setup, all_steps, groups
from moma_rt.errors import InputError

H200 = {"name": "NVIDIA H200", "driver": "580", "capability": "9.0"}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(plan, "gpu_facts", lambda: H200)


@pytest.fixture
def setup(on_gpu, tmp_path) -> Setup:
    return Setup.of({"WORK": str(tmp_path)}, "first")


def test_the_defaults_are_those_of_the_gpu(setup, tmp_path):
    assert setup.target == "inductor:sm90"
    assert (setup.precision, setup.backend, setup.rehearse) == ("fp16", "inductor", False)
    assert setup.bundle == tmp_path / "bundle"
    assert setup.carried.parts[-2:] == (".ship", "first")


def test_environment_variables_override_the_defaults(on_gpu, tmp_path):
    given = {"BACKEND": "tensorrt", "TARGET": "sm90", "PRECISION": "bf16", "BUNDLE": "there", "SHIP": "carried"}
    setup = Setup.of(given, "second")
    assert (setup.backend, setup.target, setup.precision) == ("tensorrt", "sm90", "bf16")
    assert (setup.bundle.name, setup.carried.name) == ("there", "carried")
    build = all_steps(setup)["build"].command
    assert build[build.index("--target") + 1] == "local"
    assert build[build.index("--precision") + 1] == "bf16"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "nvidia-smi finds no GPU on this machine; REHEARSE=1"),
        ({"REHEARSE": "yes"}, "REHEARSE=yes: it must be 1"),
        ({"REHEARSE": "1", "BACKEND": "cuda"}, "BACKEND=cuda; there are: auto, onnxruntime"),
    ],
)
def test_invalid_environment_variables(environ, said, monkeypatch):
    monkeypatch.setattr(plan, "gpu_facts", lambda: None)
    with pytest.raises(InputError, match=said):
        Setup.of(environ, "first")


def test_the_steps_of_each_call(setup):
    assert [[step.name for step in group] for group in groups(setup, "first", ())] == [
        ["facts"],
        ["kernel_tests", "prepare"],
        ["denoiser"],
        ["profile"],
        ["baselines"],
        ["attention"],
        ["build"],
        ["latency"],
    ]
    assert [step.name for (step,) in groups(setup, "second", ())] == ["rtx_probe", "latency_again", "compiled"]
    # Even if every step takes its time limit, enough is left to measure whole requests at the end.
    before = [group for group in groups(setup, "first", ()) if group[0].name not in ("build", "latency")]
    limits = sum(max(step.seconds for step in group) for group in before)
    steps = all_steps(setup)
    assert CALLS["first"] - limits > steps["latency"].least
    assert steps["build"].leaves >= steps["latency"].least


def test_a_build_uses_matrix_products_of_aten_only(setup):
    steps = all_steps(setup)
    for name in ("build", "whole_build"):
        assert steps[name].environment["TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS"] == "ATEN"
    command = steps["build"].command
    assert command[command.index("--target") + 1] == "inductor"
    assert command[command.index("--only") + 1] == "text_encoder,denoiser,vae_decoder,context_projector"
    # A carried bundle is completed with the options it was built with.
    prepare = steps["prepare"].command
    assert prepare[prepare.index("--") + 1 :][-2:] == ("--target", "inductor:sm90")


def test_gpu_tools_are_used_only_where_there_is_a_gpu(setup, tmp_path, monkeypatch):
    assert all_steps(setup)["memcheck"].command[:3] == ("compute-sanitizer", "--tool", "memcheck")
    rehearsed = Setup.of({"REHEARSE": "1", "WORK": str(tmp_path)}, "first")
    assert all_steps(rehearsed)["memcheck"].command[0] == sys.executable
    assert all_steps(rehearsed)["attention"].command[-1] == "--rehearse"
    assert not any("--rehearse" in step.command for step in all_steps(setup).values())


def test_named_steps_run_alone_in_their_order(setup):
    assert [step.name for (step,) in groups(setup, "first", ("soak", "facts"))] == ["facts", "soak"]
    with pytest.raises(InputError, match="no step speeed; there are: facts, kernel_tests"):
        groups(setup, "first", ("speeed",))


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    for name, value in {"REHEARSE": "1", "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}.items():
        monkeypatch.setenv(name, value)
    assert main(["first", "quick"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "no step quick" in captured.err
    assert list(tmp_path.iterdir()) == []
    assert main(["first", "--list"]) == 0
    assert "soak_batches" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [["--list"], ["second", "--list"]])
def test_steps_are_listed_where_there_is_no_gpu(given, monkeypatch, capsys):
    monkeypatch.setattr(plan, "gpu_facts", lambda: None)
    monkeypatch.delenv("REHEARSE", raising=False)
    assert main(given) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"facts", "rtx_probe", "soak_batches", "latency_compiled"} <= listed.keys()
    assert listed["prepare"].endswith("--target inductor:smNN")
    assert main(["first"]) == 2
    with pytest.raises(SystemExit):
        main([])


def test_a_lease_without_time_fails(tmp_path, monkeypatch, capsys):
    for name, value in {"REHEARSE": "1", "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease.signal, "signal", lambda *_: None)
    assert main(["first", "--seconds", "0"]) == 1
    found = json.loads((tmp_path / "out" / "lease.json").read_text())
    assert {step["status"] for step in found["steps"].values()} == {"skipped"}
    commands = {name: step["command"] for name, step in found["steps"].items()}
    assert commands["facts"][:3] == ["python3", "-m", "benchmarks.gpu.facts"]
    assert "$WORK/cup.subject" in commands["latency"]
    assert not any(part.startswith("/") for command in commands.values() for part in command)
    assert capsys.readouterr().out.splitlines()[-2].startswith("lease: 0 of 9 steps passed")


def rehearsed(repository, script, out, *steps, **variables):
    """Run one of the scripts as a rehearsal; return its output and its report of the steps."""
    environment = {**os.environ, "REHEARSE": "1", "PYTHON": sys.executable, "OUT": str(out), **variables}
    done = subprocess.run(
        ["bash", str(repository / "benchmarks" / "gpu" / script), *steps],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    name = {"lease.sh": "lease", "lease_2.sh": "lease_2"}[script]
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def own_bundle(tiny_bundle, tmp_path_factory):
    """A copy of the tiny bundle, which a lease may change."""
    folder = tmp_path_factory.mktemp("lease") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return folder


def test_a_rehearsal_of_the_first_call(repository, own_bundle, tmp_path):
    """Run every step on ONNX Runtime, since packages take minutes to compile."""
    out, work = tmp_path / "out", tmp_path / "work"
    variables = {"BACKEND": "onnxruntime", "TARGET": "cpu", "BUNDLE": str(own_bundle), "WORK": str(work)}
    said, found = rehearsed(repository, "lease.sh", out, **variables)
    assert found["rehearsal"] is True
    assert [step["status"] for step in found["steps"].values()] == ["passed"] * 9
    # One line for each step, and a summary.
    assert len(said.splitlines()) == 10
    assert sorted(path.name for path in out.iterdir()) == ["lease.json", "lease.tar.gz"]
    written = {path.stem: json.loads(path.read_text()) for path in (work / "results").glob("*.json")}
    steps = ("facts", "denoiser", "profile", "baselines", "attention")
    assert {name: written[name]["complete"] for name in steps} == dict.fromkeys(steps, True)
    assert all(written[name]["rehearsal"] for name in steps)
    assert [case["halves"] for case in written["denoiser"]["times"]] == [2, 1]
    assert all(error["package"]["next_latents"] < 1e-4 for error in written["denoiser"]["errors"])
    assert {(case["kind"], case["scheduler"]) for case in written["baselines"]["cases"]} == {
        (kind, scheduler) for kind in ("moma", "plain") for scheduler in ("ddim", "lcm")
    }
    assert len(written["attention"]["cases"]) == 3
    assert written["latency_ddim"]["runtime"]["requests"]["warm"]["total"]["p50"] > 0
    assert (work / "cup.subject").is_file()


@pytest.mark.slow
def test_a_rehearsal_with_inductors_packages(repository, tmp_path):
    """Run both calls as on a GPU, but on the CPU: packages are compiled, which takes minutes."""
    pytest.importorskip("diffusers")
    out, work = tmp_path / "out", tmp_path / "work"
    rehearsed(repository, "lease.sh", out, WORK=str(work))
    assert json.loads((work / "results" / "profile.json").read_text())["launches"] > 0
    said, found = rehearsed(repository, "lease_2.sh", out, WORK=str(work))
    assert len(said.splitlines()) == 4
    assert json.loads((work / "results" / "baselines_compiled.json").read_text())["complete"]


@pytest.mark.slow
def test_a_rehearsal_of_the_steps_of_no_call(repository, own_bundle, tmp_path):
    out = tmp_path / "out"
    variables = {"BACKEND": "onnxruntime", "TARGET": "cpu", "BUNDLE": str(own_bundle), "WORK": str(tmp_path / "work")}
    rehearsed(repository, "lease.sh", out, "prepare", "profile", **variables)
    named = ("timer_tests", "ptx", "launches", "memcheck", "counters", "whole_build", "soak", "soak_batches")
    _, found = rehearsed(repository, "lease.sh", out, *named, "latency_eager", **variables)
    assert list(found["steps"]) == [*named, "latency_eager"]
    assert json.loads((tmp_path / "work" / "results" / "soak.json").read_text())["wrong"] == 0
