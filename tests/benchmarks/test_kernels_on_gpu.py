"""The script of the whole proof, with a python3 that only says what it was asked."""

import os
import re
import shutil
import subprocess

import pytest

FAKE_PYTHON = """#!/bin/sh
echo "asked: $*"
case "$*" in *"$FAILS"*) exit 3 ;; esac
case "$*" in
*--tune*) echo "_CROSS[96]: LaunchConfig(1, 2, 3, 4)  # 1.00x as fast as now"; echo "$RESULTS/tuning.json" ;;
*benchmarks.kernels*) printf 'attention of one step, ms\\nrow\\n%s\\n' "$RESULTS/speed.json" ;;
esac
"""
FAKE_SANITIZER = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def script(repository, tmp_path):
    """Run the script with these stages; returns exit code, standard output and the folder of results."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", FAKE_SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("speed", "tuning"):
        (tmp_path / f"{name}.json").write_text("{}")

    def run(*stages, fails="nothing", sanitizer=True):
        if not sanitizer:
            (tools / "compute-sanitizer").unlink()
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "OUT": str(tmp_path / "out"),
            "RESULTS": str(tmp_path),
            "FAILS": fails,
        }
        done = subprocess.run(
            ["bash", str(repository / "benchmarks" / "kernels_on_gpu.sh"), *stages],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, tmp_path / "out"

    return run


def summary_of(done):
    lines = done.stdout.partition("== summary")[2].splitlines()[1:]
    return {m[1]: m[2] for line in lines if (m := re.match(r"(\w+) +(pass|FAIL)\b", line))}, lines


def test_all_stages(script):
    done, out = script()
    assert done.returncode == 0, done.stderr
    found, lines = summary_of(done)
    stages = ("tests", "launches", "memcheck", "racecheck", "ptx", "timer", "speed", "tuning")
    assert {name: found[name] for name in stages} == dict.fromkeys(stages, "pass")
    # What a stage said last.
    (memcheck,) = (line for line in lines if line.startswith("memcheck"))
    assert re.fullmatch(r"memcheck +pass, \d+ s: asked: -m benchmarks.sanitized_launches", memcheck)
    assert lines[-3:] == [
        "attention of one step, ms",
        "row",
        "_CROSS[96]: LaunchConfig(1, 2, 3, 4)  # 1.00x as fast as now",
    ]
    assert sorted(path.name for path in out.iterdir()) == ["kernels_on_gpu.log", "speed.json", "tuning.json"]
    log = (out / "kernels_on_gpu.log").read_text()
    asked = [line.removeprefix("asked: -m ") for line in log.splitlines() if line.startswith("asked: ")]
    assert asked.count("benchmarks.sanitized_launches") == 3
    assert asked[-2:] == ["benchmarks.kernels --minutes 3.5", "benchmarks.kernels --tune"]
    assert log.rstrip().endswith(lines[-1])


@pytest.mark.parametrize(
    ("fails", "failed"), [("q -p no:cacheprovider tests/kernels/test_ptx", "ptx"), ("tune", "tuning")]
)
def test_a_failure_is_told_and_the_rest_goes_on(fails, failed, script):
    done, out = script("tests", "ptx", "tuning", fails=fails)
    assert done.returncode == 1
    found, _ = summary_of(done)
    stages = {name: found[name] for name in ("tests", "ptx", "tuning")}
    assert stages == {"tests": "pass", "ptx": "pass", "tuning": "pass"} | {failed: "FAIL"}
    assert "speed" not in found


def test_stages_by_name(script):
    done, out = script("tuning")
    assert done.returncode == 0
    assert list(summary_of(done)[0])[0] == "tuning"
    assert "benchmarks.kernels --minutes" not in (out / "kernels_on_gpu.log").read_text()


def test_no_gpu(script):
    done, out = script(fails="is_available")
    assert done.returncode == 2
    assert re.fullmatch(r"\S+ has no PyTorch that sees a CUDA GPU\n", done.stderr)
    assert not out.exists()


def test_an_unknown_stage(script):
    done, out = script("tests", "speeed")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["no stage 'speeed'; there are: tests sanitizer ptx speed tuning"]
    assert not out.exists()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="there is one on this machine")
def test_no_compute_sanitizer(script):
    done, _ = script("sanitizer", sanitizer=False)
    assert done.returncode == 0
    assert "skipped: there is no compute-sanitizer" in done.stdout
