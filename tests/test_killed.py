"""Builds of networks and engines, killed at random moments: final names are whole, and the next build goes on.

A timer of the process's own computing time kills it, so that nothing here waits and any instruction may be the last.
"""

import importlib.util
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moma_rt.bundle import Bundle, FileEntry
from moma_rt.files import sha256_file

NAMES = ("context_projector", "text_encoder")
MOMENTS = 10
# SIGVTALRM is never handled here: its default ends a process as abruptly as SIGKILL does. It is set for a time that
# passes only while this process computes.
SERVER = """
import json, os, signal, sys
from pathlib import Path
from engines.build import EnginePlan, build_engines
from engines.store import SharedStore
from engines.targets import Machine, resolve
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import CheckpointRequest, load_checkpoint, roles_for
from export.networks import Precisions
from moma_rt.specs import Precision

names, targets = json.loads(sys.argv[1])
checkpoint = load_checkpoint(CheckpointRequest("tiny", roles=roles_for(names)))
plan = ExportPlan(tuple(names), Precisions(Precision.FP16, Precision.FP16))
engines = EnginePlan(resolve(tuple(targets), Machine.here()))
# The libraries are imported once; nothing has run in them, so that a fork of this process may.
for line in sys.stdin:
    root, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        if seconds:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        shared = SharedStore(Path(root).parent / "store")
        build_bundle(checkpoint, plan, Path(root), lambda *_: None, shared)
        if engines.targets:
            build_engines(Path(root), engines, shared, lambda *_: None)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime]), flush=True)
"""


def incomplete(root: Path) -> list[str]:
    """What lies under a final name, in a bundle or a store, and is not what its record or its manifest says."""
    wrong = []
    for folder in (path for kind in ("networks", "engines") for path in root.glob(f"{kind}/*")):
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
        bundle.verified(bundle.manifest.files)
    return wrong


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def build(repository):
    """Builds a bundle in a process of its own, ended after some seconds of computing (0: not at all)."""
    targets = ["sm86"] if importlib.util.find_spec("tensorrt_rtx") is not None else ["cpu"]
    command = [sys.executable, "-c", SERVER, json.dumps([NAMES, targets])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=repository, text=True, **pipes) as server:

        def run(root: Path, seconds: float) -> tuple[int, float]:
            print(json.dumps([str(root), seconds]), file=server.stdin, flush=True)
            code, used = json.loads(server.stdout.readline())
            return code, used

        yield run
        server.stdin.close()


def test_killed_at_random_moments(tmp_path, build):
    whole = tmp_path / "whole" / "bundle"
    code, computing = build(whole, 0)
    assert code == 0
    assert incomplete(whole) == []

    chance, root, killed = random.Random(0), tmp_path / "killed" / "bundle", 0
    for number in range(MOMENTS):
        # Half of them begin anew, so that the early moments are met as often as the late ones.
        if number % 2 == 0:
            root = tmp_path / f"killed-{number}" / "bundle"
        code, _ = build(root, chance.uniform(0.02, 0.95) * computing)
        assert code in (0, -signal.SIGVTALRM)
        killed += code != 0
        assert incomplete(root) == []
        assert incomplete(root.parent / "store") == []
    assert killed >= MOMENTS // 2

    for root in sorted(tmp_path.glob("killed-*/bundle")):
        assert build(root, 0)[0] == 0
        assert incomplete(root) == []
        assert contents(root) == contents(whole)
        assert not list(root.rglob(".partial-*"))
