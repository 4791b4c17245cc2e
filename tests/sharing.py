"""Folders that are built once per test run, by whichever worker process needs them first, and only read afterwards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


class SharedFolders:
    """Builds each named folder once for all worker processes of a run, and tells whether tests changed one.

    pytest-xdist gives each worker a folder of its own inside that of the run; the shared ones lie beside those.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        self._root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
        self._root.mkdir(exist_ok=True)
        self._used: set[str] = set()

    def build(self, name: str, build: Callable[[Path], object]) -> Path:
        """The folder `name`, which `build(folder)` made in this worker or another one."""
        # In a folder of its own: a bundle's build keeps a store beside the bundle.
        place, state = self._root / name, self._state(name)
        folder = place / name
        place.mkdir(exist_ok=True)
        with FileLock(place / "lock"):
            if not state.exists():
                # What a build that failed left behind.
                shutil.rmtree(folder, ignore_errors=True)
                build(folder)
                state.write_text(json.dumps(snapshot(folder)))
        self._used.add(name)
        return folder

    def changed(self) -> list[str]:
        """Files of the folders used here that are not as their build left them."""
        found = []
        for name in sorted(self._used):
            before, now = json.loads(self._state(name).read_text()), snapshot(self._root / name / name)
            found += [f"{name}/{file}" for file in sorted({*before, *now}) if before.get(file) != now.get(file)]
        return found

    def _state(self, name: str) -> Path:
        return self._root / name / "state.json"


def snapshot(folder: Path) -> dict[str, list[int]]:
    """Size and modification time of every file, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
