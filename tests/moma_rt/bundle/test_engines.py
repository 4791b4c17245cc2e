import dataclasses

import pytest

from moma_rt.bundle.engines import CPU_DEVICE, Device, EngineEntry, Flavour, Library, format_capabilities, select
from moma_rt.errors import BundleError

RTX = Library(Flavour.TENSORRT_RTX, "1.7.1")
FULL = Library(Flavour.TENSORRT, "11.4.0")
TORCH = Library(Flavour.INDUCTOR, "2.13.0+cu130")
RTX4090, H100 = Device("RTX 4090", 89), Device("H100", 90)


def engine(network="denoiser", library=RTX, capabilities=(86, 89)):
    return EngineEntry(
        network, library.flavour, library.version, capabilities, False, "k", "e", f"engines/{network}/e", 7, None, None
    )


ENGINES = (
    engine("denoiser"),
    engine("denoiser", capabilities=(120,)),
    engine("vae_decoder"),
    engine("denoiser", FULL, (90,)),
)


def test_a_device_gets_its_own_engines():
    assert select(ENGINES, ["denoiser", "vae_decoder"], RTX, RTX4090) == {
        "denoiser": ENGINES[0],
        "vae_decoder": ENGINES[2],
    }
    assert select(ENGINES, ["denoiser"], RTX, Device("RTX 5090", 120)) == {"denoiser": ENGINES[1]}
    assert select(ENGINES, ["denoiser"], FULL, H100) == {"denoiser": ENGINES[3]}


@pytest.mark.parametrize(
    ("networks", "library", "device", "said"),
    [
        (
            ["denoiser", "vae_decoder"],
            FULL,
            H100,
            "no engine of vae_decoder for tensorrt 11.4.0 on sm90 (H100); the bundle has engines for "
            "tensorrt 11.4.0 on sm90; tensorrt_rtx 1.7.1 on sm120; tensorrt_rtx 1.7.1 on sm86,sm89: "
            "build the missing ones with python -m engines.build BUNDLE --target local",
        ),
        (["denoiser"], dataclasses.replace(RTX, version="1.8"), RTX4090, "BUNDLE --target sm89"),
        (["vae_decoder"], RTX, Device("RTX 5090", 120), "no engine of vae_decoder for tensorrt_rtx 1.7.1 on sm120"),
        (["denoiser"], FULL, Device("RTX 4090", 89), "BUNDLE --target local"),
        (["denoiser"], TORCH, H100, "for inductor 2.13.0+cu130 on sm90 (H100); the bundle has engines for "),
        (["denoiser"], TORCH, H100, "build the missing ones with python -m export.build ... --target inductor"),
        (
            ["denoiser"],
            TORCH,
            CPU_DEVICE,
            "for inductor 2.13.0+cu130 on cpu (this machine's CPU); the bundle has engines for ",
        ),
    ],
)
def test_the_error_names_missing_engines_and_how_to_build_them(networks, library, device, said):
    with pytest.raises(BundleError) as caught:
        select(ENGINES, networks, library, device)
    assert said in str(caught.value)


def test_a_cpu_is_a_device_like_others():
    on_cpu, on_gpu = engine("denoiser", TORCH, (0,)), engine("denoiser", TORCH, (90,))
    assert select([on_cpu, on_gpu], ["denoiser"], TORCH, CPU_DEVICE) == {"denoiser": on_cpu}
    assert select([on_cpu, on_gpu], ["denoiser"], TORCH, H100) == {"denoiser": on_gpu}
    assert EngineEntry.from_json(on_cpu.to_json()) == on_cpu
    assert format_capabilities([0]) == "cpu"
    other = dataclasses.replace(TORCH, version="2.12.0+cpu")
    with pytest.raises(
        BundleError, match=r"for inductor 2.12.0\+cpu on cpu .* engines for inductor 2.13.0\+cu130 on cpu:"
    ):
        select([on_cpu], ["denoiser"], other, CPU_DEVICE)


def test_a_bundle_without_engines():
    with pytest.raises(BundleError, match="the bundle has engines for no device"):
        select((), ["denoiser"], RTX, RTX4090)


def test_entries_survive_json():
    for entry in ENGINES:
        assert EngineEntry.from_json(entry.to_json()) == entry
