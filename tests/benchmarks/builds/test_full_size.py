"""What the export at full size reports of its files, seen on the tiny bundle."""

from benchmarks.builds.full_size import file_bytes
from moma_rt.bundle.manifest import Bundle


def test_shared_weights_are_counted_once(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    sizes = file_bytes(manifest)
    groups = {f"weights of {name}" for name in (*manifest.networks, "unet")}
    assert set(sizes) == groups | {"graphs"}
    on_disk = {path for kind in ("networks", "weights") for path in tiny_bundle.glob(f"{kind}/*/*")}
    assert sum(sizes.values()) == sum(path.stat().st_size for path in on_disk if path.name != "record.json")
    assert sizes["weights of unet"] > 20 * sizes["weights of denoiser"]
