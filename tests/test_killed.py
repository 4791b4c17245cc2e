"""Builds of networks and engines killed at random: no partial file has a final name, and the next build resumes.

A timer on the process's own CPU time kills it, so that no test waits and any instruction may be the last.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moma_rt.bundle.manifest import Bundle, FileEntry
from moma_rt.files import sha256_file

NAMES = ("context_projector", "text_encoder")
KINDS = ("networks", "weights", "engines", "kernels")
MOMENTS = 10
# SIGVTALRM has no handler here, so it ends the process as abruptly as SIGKILL. Its timer counts CPU time.
SERVER = """
import dataclasses, json, os, signal, sys
from pathlib import Path
from types import MappingProxyType
from engines.builder import EnginePlan, build_engines
from engines.store import SharedStore
from engines.targets import Machine, resolve
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import CheckpointRequest, load_checkpoint, presets, roles_for
from export.networks import Precisions
from moma_rt.bundle.specs import Precision
from tests.torchlib import read_once

read_once(now=True)
names, targets = json.loads(sys.argv[1])
# One layer is enough, and traced faster.
one_layer = MappingProxyType({**presets.TINY.text_encoder, "num_hidden_layers": 1})
presets.TINY = dataclasses.replace(presets.TINY, text_encoder=one_layer)
checkpoint = load_checkpoint(CheckpointRequest("tiny", roles=roles_for(names)))
plan = ExportPlan(tuple(names), Precisions(Precision.FP16, Precision.FP16))
engines = EnginePlan(resolve(tuple(targets), Machine.here()))

def report(network, state):
    print(network, state, sep=":", flush=True)

# Import the libraries once and fork for each build: that is safe, since nothing has been computed with them yet.
for line in sys.stdin:
    root, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        if seconds:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        print(os.getpid(), flush=True)
        shared = SharedStore(Path(root).parent / "store")
        build_bundle(checkpoint, plan, Path(root), report, shared)
        if engines.targets:
            build_engines(Path(root), engines, shared, report)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    print("gone", json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime]), flush=True)
"""


@dataclass(frozen=True)
class Build:
    """How a build ended: its exit code (negative: a signal), CPU seconds, and reported lines."""

    code: int
    cpu_seconds: float
    said: list[str]


def incomplete(root: Path) -> list[str]:
    """Return paths with a final name, in a bundle or a store, whose content differs from the record or the manifest."""
    wrong = []
    for folder in (path for kind in KINDS for path in root.glob(f"{kind}/*")):
        if folder.name.startswith(".partial-"):
            continue
        record = folder / "record.json"
        files = json.loads(record.read_text())["files"] if record.is_file() else {}
        found = {path.name for path in folder.iterdir()} - {record.name}
        if not files or found != set(files):
            wrong.append(str(folder))
        for name, file in files.items():
            path = folder / name
            if path.is_file() and FileEntry(sha256_file(path), path.stat().st_size) != FileEntry(**file):
                wrong.append(str(path))
    if (root / "manifest.json").is_file():
        bundle = Bundle.open(root)
        bundle.verify(bundle.manifest.files)
    return wrong


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def build(repository):
    """Build a bundle in its own process, killed after `seconds` of CPU time or at a report that starts with `until`."""
    targets = ["sm86"] if importlib.util.find_spec("tensorrt_rtx") is not None else ["cpu"]
    command = [sys.executable, "-c", SERVER, json.dumps([NAMES, targets])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=repository, text=True, **pipes) as server:

        def run(root: Path, seconds: float = 0, until: str = "never") -> Build:
            print(json.dumps([str(root), seconds]), file=server.stdin, flush=True)
            process, said = 0, []
            for line in server.stdout:
                if line.startswith("gone "):
                    return Build(*json.loads(line.removeprefix("gone ")), said)
                if not process:
                    process = int(line)
                    continue
                said.append(line.strip())
                if line.startswith(until):
                    os.kill(process, signal.SIGKILL)
            raise AssertionError(said)

        yield run
        server.stdin.close()


def test_killed_at_random_moments(tmp_path, build):
    whole = tmp_path / "whole" / "bundle"
    complete = build(whole)
    assert complete.code == 0
    assert incomplete(whole) == []

    chance, root, killed = random.Random(0), tmp_path / "killed" / "bundle", 0
    for number in range(MOMENTS):
        # Every other build starts from nothing, so that early moments are hit as often as late ones.
        if number % 2 == 0:
            root = tmp_path / f"killed-{number}" / "bundle"
        code = build(root, chance.uniform(0.02, 0.95) * complete.cpu_seconds).code
        assert code in (0, -signal.SIGVTALRM)
        killed += code != 0
        assert incomplete(root) == []
        assert incomplete(root.parent / "store") == []
    assert killed >= MOMENTS // 2

    for root in sorted(tmp_path.glob("killed-*/bundle")):
        assert build(root).code == 0
        assert incomplete(root) == []
        assert contents(root) == contents(whole)
        assert not list(root.rglob(".partial-*"))


def test_killed_when_it_announces_a_stage(tmp_path, build):
    """The announced stage is cut off somewhere; finished stages are kept."""
    root, finished = tmp_path / "bundle", {"networks": 0, "weights": 0}
    for network in NAMES:
        for stage, kind in ((f"writing the weights of {network}", None), ("tracing", "weights")):
            killed = build(root, until=f"{network}:{stage}")
            assert killed.code == -signal.SIGKILL
            assert not (root / "manifest.json").exists()
            finished |= {} if kind is None else {kind: finished[kind] + 1}
            assert incomplete(root) == []
            complete = {kind: [p for p in (root / kind).iterdir() if p.name[0] != "."] for kind in finished}
            assert {kind: len(places) for kind, places in complete.items()} == finished
        # The network's graph is finished when the next network starts, or at the end.
        finished["networks"] += 1
    # From here on the build may end before the signal arrives; the bundle is complete then.
    build(root, until=f"{NAMES[-1]}:tracing")
    assert incomplete(root) == []
    last = build(root)
    assert last.code == 0
    assert f"{NAMES[0]}:kept" in last.said
    assert not [line for line in last.said if "writing" in line]
    assert incomplete(root) == []
    assert set(Bundle.open(root).manifest.networks) == set(NAMES)
