"""Bundles whose networks and weights are a few bytes, for tests of what a build makes, keeps and leaves behind."""

from pathlib import Path

from export.bundling import ExportPlan, build_bundle
from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint, roles_for
from moma_rt.bundle.manifest import Bundle

SMALL = ("text_encoder", "context_projector")


def checkpoint_of(names, **changes):
    roles = roles_for(names)
    # As the command line does: the language model's sizes need the vision encoder's config.
    return load_checkpoint(
        CheckpointRequest("tiny", roles=roles | {"vision"} if "language" in roles else roles, **changes)
    )


def build(out, names=SMALL, checkpoint=None, report=lambda *_: None, shared=None, **plan):
    return build_bundle(checkpoint or checkpoint_of(names), ExportPlan(tuple(names), **plan), out, report, shared)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def folders(root: Path, kind: str = "networks") -> dict[str, tuple[str, int]]:
    """Map each network or group of weights to the name and the inode of its folder."""
    places = (root / kind).iterdir()
    return {p.name.rsplit("-", 1)[0]: (p.name, p.stat().st_ino) for p in places}


def verify(root: Path) -> Bundle:
    """Open a bundle; check that every file has its hash and that the folder holds no other files."""
    bundle = Bundle.open(root)
    bundle.verify(bundle.manifest.files)
    records = {f"{folder}/record.json" for entry in bundle.manifest.networks.values() for folder in entry.folders}
    assert set(contents(root)) == set(bundle.manifest.files) | records | {"manifest.json", ".lock"}
    assert set(folders(root)) == {name for name, entry in bundle.manifest.networks.items() if entry.graphs}
    used = set().union(*(NETWORK_ROLES[name] for name in bundle.manifest.networks))
    assert {source.role for source in bundle.manifest.sources} == used
    return bundle


def overwrite(path, content):
    """Overwrite a read-only file in place, so that its hard links in other bundles change as well."""
    path.chmod(0o644)
    path.write_bytes(content)
