"""Adds engine entries to a bundle's manifest and removes them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from engines.store import Stored
from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.manifest import Bundle, Manifest


def without_missing_engines(root: Path, manifest: Manifest) -> Manifest:
    """Return the manifest without engines whose files are missing or truncated, so that they are built again."""

    def is_whole(name: str) -> bool:
        path, file = Bundle(root, manifest).path(name), manifest.files.get(name)
        return file is not None and path.is_file() and path.stat().st_size == file.size

    return _with_engines(manifest, [engine for engine in manifest.engines if is_whole(engine.file)])


def with_engine(manifest: Manifest, entry: EngineEntry, stored: Stored) -> Manifest:
    """Return the manifest with an engine in place of those for the same network, flavour and no other device."""
    kept = [
        engine
        for engine in manifest.engines
        if (engine.network, engine.flavour) != (entry.network, entry.flavour)
        or not set(engine.capabilities) <= set(entry.capabilities)
    ]
    found = _with_engines(manifest, [*kept, entry])
    return dataclasses.replace(found, files=dict(sorted({**found.files, **stored.files}.items())))


def _with_engines(manifest: Manifest, engines: Iterable[EngineEntry]) -> Manifest:
    """Return the manifest with exactly these engines, sorted, and without the files of all others."""
    order = list(manifest.networks)
    kept = sorted(engines, key=lambda e: (order.index(e.network), e.flavour.value, e.capabilities))
    dropped = {e.folder for e in manifest.engines} - {e.folder for e in kept}
    files = {name: file for name, file in manifest.files.items() if str(PurePosixPath(name).parent) not in dropped}
    return dataclasses.replace(manifest, engines=tuple(kept), files=files)
