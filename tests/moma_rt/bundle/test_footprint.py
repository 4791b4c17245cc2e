"""Which networks fit a memory budget, and that they are evicted and loaded again if not all do."""

import dataclasses

import numpy as np
import pytest

from moma_rt.bundle.engines import EngineEntry, Flavour
from moma_rt.bundle.footprint import (
    Footprint,
    combined_bytes,
    describe_budget,
    footprint,
    format_bytes,
    load_groups,
    parse_bytes,
)
from moma_rt.bundle.manifest import Bundle, read_manifest
from moma_rt.errors import InputError, OutOfMemory
from moma_rt.memory.limits import Limits
from moma_rt.memory.networks import Networks
from moma_rt.runtime import Runtime
from moma_rt.timing import StageTimer

SIZES = {
    "text_encoder": 100,
    "vae_encoder": 50,
    "subject_encoder": 900,
    "vision_encoder": 300,
    "language_model": 7000,
    "context_projector": 10,
    "denoiser": 1000,
    "vae_decoder": 80,
}


class Unloaded:
    """Names of unloaded networks. `on_eviction` keeps a weak reference, which a list's method does not allow."""

    def __init__(self):
        self.names = []

    def append(self, name):
        self.names.append(name)


@pytest.fixture
def manifest(fake_bundle):
    """The manifest of a bundle whose networks have the sizes of `SIZES`, in bytes."""
    manifest = read_manifest(fake_bundle)
    sizes = {manifest.networks[name].onnx: 1 for name in SIZES}
    sizes |= {manifest.networks[name].weights[0]: size - 1 for name, size in SIZES.items()}
    files = {name: dataclasses.replace(file, size=sizes.get(name, file.size)) for name, file in manifest.files.items()}
    return dataclasses.replace(manifest, files=files)


@pytest.fixture
def networks(fake_bundle, manifest, backend, monkeypatch):
    """Make `Networks` with a budget; their files are not verified, since the manifest's sizes are made up."""
    monkeypatch.setattr(Bundle, "verify", lambda *_: None)
    return lambda budget: Networks(Bundle(fake_bundle, manifest), backend, budget=budget)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1, 1),
        (8_000_000_000, 8_000_000_000),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("7.5G", 7_500_000_000),
        ("512MiB", 512 << 20),
        (" 3 kib ", 3072),
        (np.int64(8), 8),
        ("1000", 1000),
        ("10B", 10),
    ],
)
def test_parse_bytes(given, count):
    assert parse_bytes(given) == count


@pytest.mark.parametrize(
    "given",
    [
        0,
        -1,
        "0",
        "",
        "GB",
        "8TB",
        "8 G B",
        "-8GB",
        "1e9",
        "eight",
        1.5,
        True,
        None,
        b"8GB",
        "9" * 30,
        "9" * 400,
        1 << 60,
    ],
)
def test_parse_bytes_refuses_other_values(given):
    with pytest.raises(
        InputError, match=r"a memory budget is a number of bytes below 2\*\*50, or a text such as 8GB"
    ) as caught:
        parse_bytes(given)
    assert "\n" not in str(caught.value)


def test_activations_are_shared():
    assert combined_bytes([]) == 0
    assert combined_bytes([Footprint(10, 5), Footprint(20, 7), Footprint(30, 0)]) == 67


def test_only_generation_networks_are_loaded_together():
    assert load_groups(["text_encoder", "vae_decoder", "denoiser"]) == [("text_encoder",), ("vae_decoder", "denoiser")]
    assert load_groups(["vae_encoder"]) == [("vae_encoder",)]
    assert load_groups([]) == []


def test_an_engine_needs_the_bytes_that_its_builder_counted(manifest):
    engine = EngineEntry(
        "denoiser",
        Flavour.TENSORRT,
        "11.4.0",
        (90,),
        refittable=False,
        source="s",
        key="k",
        file=manifest.networks["denoiser"].onnx,
        weight_bytes=700,
        activation_bytes=40,
        kernels=None,
    )
    assert footprint(manifest, "denoiser", engine) == Footprint(700, 40)
    unknown = dataclasses.replace(engine, weight_bytes=None, activation_bytes=None)
    assert footprint(manifest, "denoiser", unknown) == Footprint(1, 0), "its file"
    assert footprint(manifest, "denoiser", None) == Footprint(1000, 0), "the graph and the weights"
    package = dataclasses.replace(unknown, flavour=Flavour.INDUCTOR)
    (weights,) = manifest.networks["denoiser"].weights
    found = footprint(manifest, "denoiser", package)
    assert found == Footprint(1, 0, {weights: 999}), "the package and the weights beside it"
    assert combined_bytes([found]) == 1000
    assert combined_bytes([found, dataclasses.replace(found, activations=7)]) == 1008, (
        "they share one copy of the weights"
    )


def test_the_least_recently_used_network_is_evicted(networks, backend):
    loaded, unloaded = networks(8200), Unloaded()
    loaded.on_eviction(unloaded.append)
    for name in ("text_encoder", "language_model", "vae_encoder"):
        loaded.get(name, StageTimer())
    loaded.get("text_encoder", StageTimer())
    assert unloaded.names == []
    loaded.get_all(("denoiser", "vae_decoder"), StageTimer())
    assert unloaded.names == ["language_model"], "vae_encoder and text_encoder still fit"
    loaded.get("language_model", StageTimer())
    assert unloaded.names == ["language_model", "vae_encoder"]
    # 7000 + 100 + 1000 + 80.
    assert backend.loads.count("denoiser") == 1
    loaded.get("subject_encoder", StageTimer())
    assert unloaded.names[2:] == ["text_encoder", "denoiser"]


def test_a_network_is_never_evicted_for_one_loaded_with_it(networks):
    loaded, unloaded = networks(1100), Unloaded()
    loaded.on_eviction(unloaded.append)
    loaded.get("vae_decoder", StageTimer())
    loaded.get("text_encoder", StageTimer())
    loaded.get_all(("denoiser", "vae_decoder"), StageTimer())
    assert unloaded.names == ["text_encoder"]


def test_networks_that_never_fit_are_refused_before_any_is_evicted(networks):
    loaded, unloaded = networks(1050), Unloaded()
    loaded.on_eviction(unloaded.append)
    loaded.get("text_encoder", StageTimer())
    with pytest.raises(
        OutOfMemory, match=r"denoiser and vae_decoder: 1.05 KiB of memory needed, .* budget is 1.03 KiB"
    ):
        loaded.get_all(("denoiser", "vae_decoder"), StageTimer())
    with pytest.raises(OutOfMemory, match="language_model: 6.84 KiB of memory needed"):
        loaded.get("language_model", StageTimer())
    assert unloaded.names == []


def test_a_runtime_with_a_budget_makes_the_same_pictures(fake_bundle, fakes, photo, mask):
    manifest = read_manifest(fake_bundle)
    needed = {name: footprint(manifest, name, None).weights for name in manifest.networks}
    smallest = needed["denoiser"] + needed["vae_decoder"]
    assert smallest == max(sum(needed[name] for name in group) for group in load_groups(needed))
    found, backends = [], [fakes.FakeBackend(), fakes.FakeBackend()]
    for backend, budget in zip(backends, (None, smallest), strict=True):
        runtime = Runtime(Bundle.open(fake_bundle), backend, limits=Limits(memory_budget=budget))
        subject = runtime.enroll(photo, mask, "car")
        results = [runtime.generate(subject, f"A car {i}.", steps=2, num_images=2) for i in range(3)]
        found.append([image.tobytes() for result in results for image in result.images])
    assert found[0] == found[1]
    assert len(backends[0].loads) == 8
    assert backends[1].loads.count("denoiser") == 3, "each prompt needs the language model in between"


def test_an_invalid_budget_is_refused_by_load(fake_bundle):
    with pytest.raises(InputError, match="a memory budget is"):
        Runtime.load(fake_bundle, memory_budget="plenty")


@pytest.mark.parametrize(
    ("budget", "last"),
    [
        (9440, "every network stays loaded"),
        (9439, "networks are loaded in turn"),
        (7000, "networks are loaded in turn"),
        (6999, "loaded in turn; enough only to generate from a context embedding, not to enroll"),
        (1080, "loaded in turn; enough only to generate from a context embedding, not to enroll"),
        (1079, "the bundle does not fit: too large are language_model, denoiser + vae_decoder"),
    ],
)
def test_a_budget_is_described(manifest, budget, last):
    lines = describe_budget(manifest, None, budget)
    assert last in lines[-1]
    rows = {tuple(line.split("  ")[1:2]): line for line in lines[:-1]}
    assert ("denoiser + vae_decoder",) in rows
    assert rows["all of them",].endswith("does not fit") == (budget < 9440)


def test_format_bytes():
    assert [format_bytes(n) for n in (None, 0, 1023, 1024, 1536, 7 << 30)] == [
        "unknown",
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "7 GiB",
    ]
