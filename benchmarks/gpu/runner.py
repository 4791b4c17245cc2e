"""Runs steps, each in a process with a time limit, all under one deadline.

A step that fails or times out does not stop the next one. One JSON file holds the status of each step, and is rewritten
whenever a step starts or ends. One archive holds all results and logs, and is rewritten every few seconds, so that two
files are enough to copy from the machine.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.environment import write_results
from moma_rt.files import atomic_write
from moma_rt.messages import one_line

# Seconds between SIGTERM and SIGKILL, and between the last step's end and the deadline.
GRACE = 3.0
# The variable that gives a step its time limit.
SECONDS_VARIABLE = "MOMA_RT_SECONDS"
_POLL = 0.02
_ARCHIVED_EVERY = 2.0
_KEPT = (".json", ".log")
_SUMMARY_CHARACTERS = 300
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """A command with time limits.

    Attributes:
        command: the program and its arguments. The last line that it prints is the step's summary.
        seconds: time limit, after which it is killed.
        least: seconds that it needs; it is skipped if fewer are left.
        leaves: seconds reserved for the steps after it.
        environment: variables in addition to those of the lease.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 5.0
    leaves: float = 0.0
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


# Steps that run in parallel.
Group = tuple[Step, ...]


@dataclass(frozen=True)
class Lease:
    """The folders and the deadline of a run.

    Attributes:
        name: file name of the JSON file with each step's status, and of the archive.
        out: folder of these two.
        results: folder of the steps' results and logs.
        seconds: time limit of the whole run.
        environment: variables of every step.
        facts: entries of the JSON file, written as they are.
        places: placeholders for this machine's paths in the JSON file, by path.
    """

    name: str
    out: Path
    results: Path
    seconds: float
    environment: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def shown(self, text: str) -> str:
        """Return the text with placeholders for this machine's paths."""
        for path in sorted(self.places, key=len, reverse=True):
            text = re.sub(rf"{re.escape(path)}(?![\w.-])", lambda _, path=path: self.places[path], text)
        return text


def run_steps(lease: Lease, groups: Iterable[Group], clock: Callable[[], float] = time.monotonic) -> bool:
    """Run all groups in order; returns whether every step passed. Prints one line for each step when it ends."""
    return _Run(lease, clock).all(groups)


class _Run:
    def __init__(self, lease: Lease, clock: Callable[[], float]) -> None:
        self._lease = lease
        self._clock = clock
        self._start = clock()
        self._records: dict[str, dict[str, Any]] = {}
        self._archived = 0.0
        self._last_error = ""

    @property
    def _left(self) -> float:
        return self._lease.seconds - (self._clock() - self._start)

    def all(self, groups: Iterable[Group]) -> bool:
        for folder in (self._lease.out, self._lease.results):
            folder.mkdir(parents=True, exist_ok=True)
        for group in groups:
            running = [started for step in group if (started := self._start_step(step)) is not None]
            try:
                while not all([self._has_ended(each) for each in running]):
                    time.sleep(_POLL)
                    if self._clock() > self._archived + _ARCHIVED_EVERY:
                        self._archive()
            finally:
                # Steps are still running only if this process was told to end.
                for each in running:
                    each.kill()
                self._archive()
        passed = [name for name, record in self._records.items() if record["status"] == "passed"]
        others = [f"{name} {record['status']}" for name, record in self._records.items() if name not in passed]
        total = self._clock() - self._start
        print(f"{self._lease.name}: {len(passed)} of {len(self._records)} steps passed in {total:.0f} s", flush=True)
        if others:
            print(f"not passed: {', '.join(others)}", flush=True)
        return not others

    def _start_step(self, step: Step) -> "_Running | None":
        limit = min(step.seconds, self._left - step.leaves - 2 * GRACE)
        if limit < step.least:
            told = f"needs {step.least:.0f} s, {max(0.0, limit):.0f} s are left for it"
            self._note(step, {"status": "skipped", "summary": told})
            return None
        self._note(step, {"status": "running", "limit": round(limit, 1)}, is_final=False)
        try:
            return _Running(step, limit, self._lease, self._clock)
        except OSError as error:
            self._note(step, {"status": "failed", "summary": f"{step.command[0]}: {error.strerror}"})
            return None

    def _has_ended(self, running: "_Running") -> bool:
        if running.is_done:
            return True
        if not running.poll():
            return False
        record = {"status": running.status, "seconds": round(running.seconds, 1), "exit_code": running.exit_code}
        self._note(running.step, {**record, "summary": running.summary()})
        if running.status != "passed":
            print(running.tail(), flush=True)
        return True

    def _archive(self) -> None:
        self._archived = self._clock()
        lease = self._lease
        try:
            with atomic_write(lease.out / f"{lease.name}.tar.gz") as target, tarfile.open(target, "w:gz") as archive:
                for path in sorted(lease.results.iterdir()):
                    # Other files may be incomplete, or deleted before they are read.
                    if path.suffix in _KEPT and not path.name.startswith("."):
                        archive.add(path, path.name)
        except OSError as error:
            self._report_write_error(error)

    def _report_write_error(self, error: OSError) -> None:
        """Print an error such as a full disk, which does not end the run; only once, since writing is retried."""
        said = f"{self._lease.name}: {one_line(error)}: not written"
        if said != self._last_error:
            print(said, flush=True)
        self._last_error = said

    def _note(self, step: Step, record: Mapping[str, Any], *, is_final: bool = True) -> None:
        shown = {name: self._lease.shown(value) if isinstance(value, str) else value for name, value in record.items()}
        self._records[step.name] = {"command": [self._lease.shown(part) for part in step.command], **shown}
        try:
            write_results(self._lease.name, {**self._lease.facts, "steps": self._records}, self._lease.out)
        except OSError as error:
            self._report_write_error(error)
        if is_final:
            taken = f" ({record['seconds']:.0f} s)" if "seconds" in record else ""
            print(f"{step.name:<14}{record['status']}{taken}: {record['summary']}", flush=True)


class _Running:
    """A step's process, which leads its own process group, and its log."""

    def __init__(self, step: Step, limit: float, lease: Lease, clock: Callable[[], float]) -> None:
        self.step = step
        self.exit_code: int | None = None
        self.is_done = False
        self.seconds = 0.0
        self._clock, self._start, self._limit = clock, clock(), limit
        self._terminated_at: float | None = None
        self._log = lease.results / f"{step.name}.log"
        told = {SECONDS_VARIABLE: f"{limit:.1f}"}
        environment = {**os.environ, **lease.environment, **step.environment, **told}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def status(self) -> str:
        if self._terminated_at is not None:
            return "timed out"
        return "passed" if self.exit_code == 0 else "failed"

    def poll(self) -> bool:
        """Return whether the process has ended; terminates it if its time is up."""
        self.exit_code = self._process.poll()
        self.seconds = self._clock() - self._start
        if self.exit_code is None:
            if self._terminated_at is None and self.seconds > self._limit:
                self._terminated_at = self.seconds
                self._signal(signal.SIGTERM)
            elif self._terminated_at is not None and self.seconds > self._terminated_at + GRACE:
                self._signal(signal.SIGKILL)
            return False
        # Kills child processes that it left running.
        self._signal(signal.SIGKILL)
        self.is_done = True
        return True

    def kill(self) -> None:
        """Kill the process and its children."""
        if not self.is_done:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self.is_done = True

    def summary(self) -> str:
        """Return the last line that it printed."""
        lines = self._lines()
        return lines[-1][:_SUMMARY_CHARACTERS] if lines else "printed nothing"

    def tail(self) -> str:
        """Return the last lines that it printed, indented."""
        return "\n".join(f"    {line[:_SUMMARY_CHARACTERS]}" for line in self._lines()[-_TAIL_LINES:])

    def _lines(self) -> Sequence[str]:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def end_with_parent() -> None:
    """Make Linux kill this process when its parent dies, since it would keep using the GPU.

    Call it in the child process, as `preexec_fn`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
