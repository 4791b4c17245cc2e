"""Steps under a deadline: one that fails, hangs or is skipped does not stop the others, and results survive a kill."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.runner import Lease, Step, run_steps


def step(name, code, seconds=30.0, **others):
    return Step(name, (sys.executable, "-c", code), seconds, **others)


def is_running(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _written(path):
    return path.exists() and path.read_text().strip()


@pytest.fixture
def lease(tmp_path):
    return Lease("lease", tmp_path / "out", tmp_path / "results", 100.0, {"OF_THE_LEASE": "1"}, {"commit": "abc"})


def records(lease):
    return json.loads((lease.out / "lease.json").read_text())["steps"]


def test_a_failing_step_does_not_stop_the_next(lease, capsys):
    steps = [
        (step("first", "print('one'); print('of interest'); print()"),),
        (step("second", "import sys; print('went wrong'); sys.exit(3)"),),
        (step("third", "import os; print(os.environ['OF_THE_LEASE'], os.environ['OWN'])", environment={"OWN": "2"}),),
    ]
    assert not run_steps(lease, steps)
    found = records(lease)
    assert [(one["status"], one["exit_code"], one["summary"]) for one in found.values()] == [
        ("passed", 0, "of interest"),
        ("failed", 3, "went wrong"),
        ("passed", 0, "1 2"),
    ]
    assert json.loads((lease.out / "lease.json").read_text())["commit"] == "abc"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first         passed (0 s): of interest")
    assert lines[1].startswith("second        failed (0 s): went wrong")
    assert lines[2] == "    went wrong"
    assert lines[-2].startswith("lease: 2 of 3 steps passed in ")
    assert lines[-1] == "not passed: second failed"
    assert (lease.results / "first.log").read_text() == "one\nof interest\n\n"


def test_all_passed(lease):
    code = "from benchmarks.environment import write_results; write_results('only', {'cases': [1]}); print('fine')"
    environment = {"MOMA_RT_RESULTS": str(lease.results)}
    assert run_steps(lease, [(step("only", code, environment=environment),)])
    # Few files are sent back; the archive holds all results and logs.
    assert sorted(path.name for path in lease.out.iterdir()) == ["lease.json", "lease.tar.gz"]
    with tarfile.open(lease.out / "lease.tar.gz") as archive:
        assert archive.getnames() == ["only.json", "only.log"]
        assert json.load(archive.extractfile("only.json")) == {"cases": [1]}


def test_a_running_steps_results_are_in_the_archive(lease):
    """The step ends when it finds its own results in the archive."""
    code = f"""
import tarfile
from pathlib import Path
from benchmarks.environment import write_results
write_results("waits", {{"cases": [1]}})
path = Path({str(lease.out / "lease.tar.gz")!r})
while not path.exists() or "waits.json" not in tarfile.open(path).getnames():
    pass
print("found")
"""
    ticks = iter(range(10**9))
    environment = {"MOMA_RT_RESULTS": str(lease.results)}
    # Every reading of the clock advances it by a second.
    unhurried = dataclasses.replace(lease, seconds=1e9)
    assert run_steps(unhurried, [(step("waits", code, 1e9, environment=environment),)], lambda: float(next(ticks)))


def test_a_full_disk_does_not_end_the_lease(lease, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(runner, "atomic_write", full)
    assert run_steps(lease, [(step("first", "print(1)"),), (step("second", "print(2)"),)])
    assert [record["status"] for record in records(lease).values()] == ["passed", "passed"]
    monkeypatch.setattr("benchmarks.environment.atomic_write", full)
    assert run_steps(lease, [(step("third", "print(3)"),)])
    told = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert sorted({line.rpartition("/")[2].split("'")[0] for line in told}) == ["lease.json", "lease.tar.gz"]


def test_a_missing_program_is_a_failure(lease):
    assert not run_steps(lease, [(Step("gone", ("no-such-program",), 5.0),), (step("next", "print(1)"),)])
    assert records(lease)["gone"]["summary"] == "no-such-program: No such file or directory"
    assert records(lease)["next"]["status"] == "passed"


def test_a_step_is_killed_at_its_limit_with_all_that_it_started(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.2)
    child = f"import time; open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('began', flush=True); time.sleep(60)"
    )

    def clock():
        """A clock that is 20 s ahead once the step's child process runs."""
        return time.monotonic() + (20.0 if _written(tmp_path / "child") else 0.0)

    assert not run_steps(lease, [(step("hangs", code, 10.0),), (step("next", "print(1)"),)], clock)
    found = records(lease)
    assert found["hangs"]["status"] == "timed out"
    assert found["hangs"]["summary"] == "began"
    assert found["hangs"]["seconds"] > 10
    assert found["next"]["status"] == "passed"
    assert not is_running(int((tmp_path / "child").read_text()))


def test_a_step_with_too_little_time_is_skipped(lease, capsys):
    """Every reading of the clock advances it by ten seconds."""
    times = iter(range(0, 10**6, 10))
    steps = [
        (step("short", "print(1)", 1000.0, least=5.0),),
        (step("long", "print(2)", 1000.0, least=90.0),),
        (step("leaves", "print(3)", 1000.0, least=5.0, leaves=95.0),),
    ]
    assert not run_steps(lease, steps, lambda: next(times))
    found = records(lease)
    assert found["short"]["status"] == "passed"
    # The time left when it began, without the reserve for killing it.
    assert 5.0 < found["short"].get("limit", 84.0) < 90.0
    assert {found["long"]["status"], found["leaves"]["status"]} == {"skipped"}
    assert found["long"]["summary"].startswith("needs 90 s, ")
    assert "skipped: needs 90 s" in capsys.readouterr().out


def test_a_step_is_told_its_time_limit(lease):
    code = f"import os; print(os.environ[{runner.SECONDS_VARIABLE!r}])"
    assert run_steps(lease, [(step("told", code, 12.0),)])
    assert float(records(lease)["told"]["summary"]) == 12.0


def test_steps_of_a_group_run_at_the_same_time(lease, tmp_path):
    """Each step waits for a file that the other one writes."""

    def waits(own, other):
        return (
            f"import pathlib, time; pathlib.Path({str(tmp_path / own)!r}).touch()\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)\nprint('met')"
        )

    assert run_steps(lease, [(step("a", waits("a", "b")), step("b", waits("b", "a")))])


# Three steps that write a case every few milliseconds, as those of a lease do.
LEASE = """
import sys
from pathlib import Path
from benchmarks.gpu.runner import Lease, Step, run_steps

CODE = '''
import sys
from benchmarks.environment import write_results
for count in range(1, 31):
    write_results(sys.argv[1], {"cases": list(range(count)), "filler": "x" * 20000})
'''
out, results = Path(sys.argv[1]), Path(sys.argv[1]) / "results"
lease = Lease("lease", out, results, 100.0, {"MOMA_RT_RESULTS": str(results), "PYTHONPATH": sys.argv[2]})
run_steps(lease, [(Step(name, (sys.executable, "-c", CODE, name), 30.0),) for name in ("one", "two", "three")])
"""


# One in each of the three steps.
@pytest.mark.parametrize("moment", [1, 0, 5])
def test_a_lease_that_is_killed_leaves_the_results_of_every_finished_step(moment, repository, tmp_path):
    chosen = random.Random(moment)
    command = [sys.executable, "-c", LEASE, str(tmp_path), str(repository)]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    # At a random point of the lease's progress, which does not depend on this machine's speed.
    finished = chosen.randrange(3)
    told = [process.stdout.readline() for _ in range(finished)]
    while not (cases := _cases(tmp_path, ("one", "two", "three")[finished])) or cases < chosen.randrange(1, 25):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert all("passed" in line for line in told)
    found = json.loads((tmp_path / "lease.json").read_text())["steps"]
    passed = [name for name, record in found.items() if record["status"] == "passed"]
    assert passed[:finished] == ["one", "two", "three"][:finished]
    for name in passed:
        assert json.loads((tmp_path / "results" / f"{name}.json").read_text())["cases"] == list(range(30))
    # The running step left a complete file as well.
    running = json.loads((tmp_path / "results" / f"{('one', 'two', 'three')[finished]}.json").read_text())
    assert running["cases"] == list(range(len(running["cases"])))


def _cases(folder, name):
    path = folder / "results" / f"{name}.json"
    return len(json.loads(path.read_text())["cases"]) if path.exists() else 0


SLEEPING = """
import signal, sys
from pathlib import Path
import benchmarks.gpu.lease
from benchmarks.gpu.runner import Lease, Step, run_steps

signal.signal(signal.SIGTERM, benchmarks.gpu.lease._stop)
CODE = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
OUT = Path(sys.argv[1])
STEP = Step("sleeps", (sys.executable, "-c", CODE), 50.0)
run_steps(Lease("lease", OUT, OUT / "results", 100.0, {}), [(STEP,)])
"""


def test_a_terminated_lease_ends_its_steps(repository, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLEEPING, str(tmp_path)], cwd=repository)
    log = tmp_path / "results" / "sleeps.log"
    while not _written(log):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not is_running(int(log.read_text()))
