"""Runs the steps of a lease, each in a process with a time limit, all of them under one deadline.

A step that fails, or is killed at its limit, does not stop the next one. What became of each step is in one JSON file,
which is rewritten whenever a step starts or ends. All results and logs are also in one archive, which is rewritten
every few seconds: a lent machine gives few files back.
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

# Between SIGTERM and SIGKILL, in seconds, and how much earlier than the deadline the last step has to end.
GRACE = 3.0
# Tells a step how many seconds it has.
SECONDS_VARIABLE = "MOMA_RT_SECONDS"
_POLL = 0.02
_ARCHIVED_EVERY = 2.0
_KEPT = (".json", ".log")
_SUMMARY_CHARACTERS = 300
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """One command of a lease.

    Attributes:
        command: the program and its arguments. The last line that it prints is the step's summary.
        seconds: at most; then it is killed.
        least: seconds; it is skipped where less is left.
        leaves: seconds of the lease that are kept for the steps after it.
        environment: variables that it gets beside those of the lease.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 5.0
    leaves: float = 0.0
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


# Steps that run at the same time.
Group = tuple[Step, ...]


@dataclass(frozen=True)
class Lease:
    """Where and how long steps run.

    Attributes:
        name: of the JSON file with what became of each step, and of the archive.
        out: folder of these two.
        results: folder of the results and logs of the steps.
        seconds: from the start to the end of all of it.
        environment: of every step.
        facts: written into the JSON file as they are.
        places: what the JSON file has in place of this machine's paths, by these.
    """

    name: str
    out: Path
    results: Path
    seconds: float
    environment: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def shown(self, text: str) -> str:
        """The text without this machine's paths."""
        for path in sorted(self.places, key=len, reverse=True):
            text = re.sub(rf"{re.escape(path)}(?![\w.-])", lambda _, path=path: self.places[path], text)
        return text


def run_steps(lease: Lease, groups: Iterable[Group], clock: Callable[[], float] = time.monotonic) -> bool:
    """Run all groups, one after the other; whether every step passed. Prints one line for each step when it ends."""
    return _Run(lease, clock).all(groups)


class _Run:
    def __init__(self, lease: Lease, clock: Callable[[], float]) -> None:
        self._lease = lease
        self._clock = clock
        self._start = clock()
        self._records: dict[str, dict[str, Any]] = {}
        self._archived = 0.0
        self._said = ""

    @property
    def _left(self) -> float:
        return self._lease.seconds - (self._clock() - self._start)

    def all(self, groups: Iterable[Group]) -> bool:
        for folder in (self._lease.out, self._lease.results):
            folder.mkdir(parents=True, exist_ok=True)
        for group in groups:
            running = [started for step in group if (started := self._begun(step)) is not None]
            try:
                while not all([self._ended(each) for each in running]):
                    time.sleep(_POLL)
                    if self._clock() > self._archived + _ARCHIVED_EVERY:
                        self._archive()
            finally:
                # Only where this process is told to end.
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

    def _begun(self, step: Step) -> "_Running | None":
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

    def _ended(self, running: "_Running") -> bool:
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
                    # Others may be half-written, or gone before they are read.
                    if path.suffix in _KEPT and not path.name.startswith("."):
                        archive.add(path, path.name)
        except OSError as error:
            self._not_written(error)

    def _not_written(self, error: OSError) -> None:
        """A full disk does not end the lease; said once, since it is tried again every few seconds."""
        said = f"{self._lease.name}: {one_line(error)}: not written"
        if said != self._said:
            print(said, flush=True)
        self._said = said

    def _note(self, step: Step, record: Mapping[str, Any], *, is_final: bool = True) -> None:
        shown = {name: self._lease.shown(value) if isinstance(value, str) else value for name, value in record.items()}
        self._records[step.name] = {"command": [self._lease.shown(part) for part in step.command], **shown}
        try:
            write_results(self._lease.name, {**self._lease.facts, "steps": self._records}, self._lease.out)
        except OSError as error:
            self._not_written(error)
        if is_final:
            taken = f" ({record['seconds']:.0f} s)" if "seconds" in record else ""
            print(f"{step.name:<14}{record['status']}{taken}: {record['summary']}", flush=True)


class _Running:
    """A step's process, which leads a group of its own, and its log."""

    def __init__(self, step: Step, limit: float, lease: Lease, clock: Callable[[], float]) -> None:
        self.step = step
        self.exit_code: int | None = None
        self.is_done = False
        self.seconds = 0.0
        self._clock, self._start, self._limit = clock, clock(), limit
        self._was_told: float | None = None
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
        if self._was_told is not None:
            return "timed out"
        return "passed" if self.exit_code == 0 else "failed"

    def poll(self) -> bool:
        """Whether it has ended; kills it where its time is up."""
        self.exit_code = self._process.poll()
        self.seconds = self._clock() - self._start
        if self.exit_code is None:
            if self._was_told is None and self.seconds > self._limit:
                self._was_told = self.seconds
                self._signal(signal.SIGTERM)
            elif self._was_told is not None and self.seconds > self._was_told + GRACE:
                self._signal(signal.SIGKILL)
            return False
        # What the process started and left.
        self._signal(signal.SIGKILL)
        self.is_done = True
        return True

    def kill(self) -> None:
        """End the process and all that it started."""
        if not self.is_done:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self.is_done = True

    def summary(self) -> str:
        """The last line that it printed."""
        lines = self._lines()
        return lines[-1][:_SUMMARY_CHARACTERS] if lines else "printed nothing"

    def tail(self) -> str:
        """The last lines that it printed, indented."""
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
    """Have Linux end this process when the one that started it is killed: it would hold the GPU.

    To be called in the new process, as `preexec_fn`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
