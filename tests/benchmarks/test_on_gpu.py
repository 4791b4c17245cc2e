"""The scripts that build a bundle and measure it on a GPU, with a python3 that only says what it was asked."""

import os
import re
import subprocess

import pytest

FAKE_PYTHON = """#!/bin/sh
echo "asked: $*"
case "$*" in *"$FAILS"*) echo "it went wrong" >&2; exit 1 ;; esac
case "$*" in
*export.build*) ;;
*)
    while [ "$1" != --out ]; do shift; done
    echo "table of $2"; echo "{}" >"$RESULTS/$2.json"; echo "$RESULTS/$2.json" ;;
esac
"""


@pytest.fixture
def script(repository, tmp_path):
    """Run a script with these parts; returns what became of it, what it asked for, and its folder of results."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(name, *parts, fails="nothing", **variables):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "OUT": str(tmp_path / "out")}
        environment |= {"RESULTS": str(tmp_path), "FAILS": fails, **variables}
        done = subprocess.run(
            ["bash", str(repository / "benchmarks" / f"{name}_on_gpu.sh"), *parts],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        log = tmp_path / "out" / f"{name}_on_gpu.log"
        asked = re.findall("^asked: -m (.*)$", log.read_text(), re.MULTILINE) if log.exists() else []
        return done, asked, tmp_path / "out"

    return run


def parsed(command, module):
    """The options of a command, by name."""
    asked, *words = command.split()
    assert asked == module
    return dict(zip(words[::2], words[1::2], strict=True))


def test_latency(script):
    done, asked, out = script("latency")
    assert done.returncode == 0, done.stderr
    build, ddim, lcm = asked
    assert build.startswith("export.build --base sd15 --weights random --precision bf16 --only ")
    assert build.endswith(f"--target inductor --out {out}/bundle")
    common = {
        "--bundle": f"{out}/bundle",
        "--backend": "inductor",
        "--context-embedding": "random",
        "--repeats": "10",
        "--baselines": "eager,plain",
    }
    ddim, lcm = (parsed(command, "benchmarks.latency") for command in (ddim, lcm))
    # Each ends by itself before it would be ended.
    assert float(ddim.pop("--minutes")) * 60 == pytest.approx(160, abs=1)
    assert float(lcm.pop("--minutes")) * 60 == pytest.approx(90, abs=1)
    assert ddim == {**common, "--out": "latency_gpu_ddim", "--steps": "50"}
    assert lcm == {**common, "--out": "latency_gpu_lcm", "--steps": "4", "--scheduler": "lcm"}
    assert {"latency_gpu_ddim.json", "latency_gpu_lcm.json"} <= {path.name for path in out.iterdir()}
    summary = done.stdout.partition("== summary")[2]
    assert "table of latency_gpu_ddim" in summary
    assert "compiled" not in summary


def test_the_compiled_baseline_has_ten_minutes_of_its_own(script):
    done, (asked,), out = script("latency", "compiled", BACKEND="tensorrt", REPEATS="3", BUNDLE="there")
    assert done.returncode == 0
    options = parsed(asked, "benchmarks.latency")
    assert 500 < float(options["--minutes"]) * 60 <= 540
    assert options["--baselines"] == "compiled"
    assert (options["--backend"], options["--bundle"], options["--repeats"]) == ("tensorrt", "there", "3")


def test_soak(script):
    done, asked, out = script("soak")
    assert done.returncode == 0, done.stderr
    build, soak = asked
    assert "--precision fp16 " in build
    options = parsed(soak, "benchmarks.soak")
    assert 500 < float(options.pop("--minutes")) * 60 <= 551
    assert options == {
        "--bundle": f"{out}/bundle",
        "--backend": "inductor",
        "--out": "soak_gpu_mixed",
        "--requests": "1000",
        "--threads": "8",
        "--max-batch": "4",
    }
    assert (out / "soak_gpu_mixed.json").exists()
    assert "table of soak_gpu_mixed" in done.stdout.partition("== summary")[2]


def test_what_the_variables_say(script):
    variables = {"REQUESTS": "100", "THREADS": "4", "MAX_BATCH": "8", "TOLERANCE": "5", "TARGET": "sm90"}
    _, (build, soak), _ = script("soak", BACKEND="tensorrt", PRECISION="bf16", **variables)
    assert "--precision bf16 " in build
    assert "--target sm90 " in build
    options = parsed(soak, "benchmarks.soak")
    names = ("--requests", "--threads", "--max-batch", "--tolerance", "--backend")
    assert [options[name] for name in names] == ["100", "4", "8", "5", "tensorrt"]


@pytest.mark.parametrize(
    ("variables", "precision", "target"),
    [
        ({}, "bf16", "inductor"),
        ({"BACKEND": "tensorrt"}, "bf16", "local"),
        ({"BACKEND": "tensorrt_rtx", "TARGET": "sm89", "PRECISION": "fp16"}, "fp16", "sm89"),
        ({"BACKEND": "onnxruntime_cuda"}, "fp16", "cpu"),
        ({"BACKEND": "onnxruntime_cuda", "PRECISION": "fp32"}, "fp32", "cpu"),
    ],
)
def test_a_backend_has_a_target_and_a_precision(script, variables, precision, target):
    _, (build, ddim), _ = script("latency", "bundle", "ddim", **variables)
    assert f"--precision {precision} " in build
    assert f"--target {target} " in build
    assert parsed(ddim, "benchmarks.latency")["--backend"] == variables.get("BACKEND", "inductor")


def test_a_part_that_fails_does_not_keep_the_next_from_running(script):
    done, asked, out = script("latency", "ddim", "lcm", fails="--steps 50")
    assert done.returncode == 1
    assert len(asked) == 2
    assert done.stdout.splitlines()[-1] == "failed: ddim"
    assert "it went wrong" in done.stdout
    assert not (out / "latency_gpu_ddim.json").exists()
    assert (out / "latency_gpu_lcm.json").exists()


@pytest.mark.parametrize("name", ["latency", "soak"])
def test_nothing_is_measured_without_a_bundle(name, script):
    done, asked, _ = script(name, fails="export.build")
    assert done.returncode == 1
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "variables", "said"),
    [
        ("latency", {}, "no part 'fast'; there are: bundle ddim lcm compiled"),
        ("soak", {}, "no part 'fast'; there are: bundle mixed"),
        ("soak", {"BACKEND": "cuda"}, "BACKEND cuda; there are: inductor, tensorrt, tensorrt_rtx, onnxruntime_cuda"),
    ],
)
def test_a_mistake(name, variables, said, script):
    done, asked, out = script(name, *([] if variables else ["fast"]), **variables)
    assert done.returncode == 2
    assert done.stderr == f"{said}\n"
    assert asked == []
    assert not out.exists()
