"""Which backend runs a bundle, on fake hosts."""

from types import SimpleNamespace

import pytest

from moma_rt.backends import NAMES, selection
from moma_rt.backends.selection import Choice, Host, choose
from moma_rt.bundle.engines import Device, EngineEntry, Flavour
from moma_rt.errors import BundleError, InputError

FULL, RTX, INDUCTOR = Flavour.TENSORRT, Flavour.TENSORRT_RTX, Flavour.INDUCTOR
H100, RTX4090, ORIN = Device("H100", 90), Device("RTX 4090", 89), Device("Orin", 87)
VERSIONS = {FULL: "11.4.0", RTX: "1.7.1", INDUCTOR: "2.13.0"}
NETWORKS = ("denoiser", "vae_decoder")


def engines(flavour, *capabilities, names=NETWORKS, version=None):
    """An engine of each network for a set of devices."""
    version = version or VERSIONS[flavour]
    return tuple(
        EngineEntry(
            name, flavour, version, capabilities, False, "k", "e", f"engines/{name}/{flavour.value}", 7, None, None
        )
        for name in names
    )


class Machine:
    """A fake `Host`. `looked` names what was looked for, and `imported` the libraries that were imported."""

    def __init__(self, device=H100, missing=(), versions=VERSIONS, provider=False, cuda=True):
        self._device, self._versions, self._provider = device, versions, provider
        self.missing = {f: (f.pip_name,) if f is INDUCTOR else (f.pip_name, "cuda-bindings") for f in missing}
        self.has_cuda = cuda
        self.looked, self.imported = set(), []

    @property
    def device(self):
        self.looked.add("device")
        return self._device

    @property
    def has_cuda_provider(self):
        self.looked.add("provider")
        return bool(self._provider)

    def check_cuda_provider(self):
        if self._provider is not True:
            raise InputError(self._provider or "it is for CPUs only")

    def version(self, flavour):
        self.imported.append(flavour)
        if flavour not in self._versions:
            raise InputError(f"the Python package {flavour.value} cannot be loaded: no libnvinfer")
        return self._versions[flavour]


def chosen(backend, entries, host):
    networks = dict.fromkeys(NETWORKS)
    return choose(backend, SimpleNamespace(engines=entries, networks=networks, has_graphs=True, packed_for=""), host)


def select(backend, entries, device=H100, missing=(), versions=VERSIONS):
    """The choice, the libraries that were imported for it, and whether the machine's GPU was looked for."""
    host = Machine(device, missing, versions)
    return chosen(backend, entries, host), host.imported, "device" in host.looked


@pytest.mark.parametrize(
    ("entries", "device", "missing", "flavour"),
    [
        (engines(FULL, 90), H100, (), FULL),
        (engines(FULL, 90), H100, {RTX}, FULL),
        (engines(RTX, 86, 89), RTX4090, (), RTX),
        (engines(RTX, 86, 89), RTX4090, {FULL}, RTX),
        (engines(RTX, 86, 89) + engines(FULL, 89), RTX4090, (), FULL),
        (engines(RTX, 86, 89) + engines(FULL, 89), RTX4090, {FULL}, RTX),
        (engines(RTX, 86, 89) + engines(FULL, 87), ORIN, (), FULL),
        (engines(RTX, 89) + engines(FULL, 89, version="10.3.0"), RTX4090, (), RTX),
        (engines(RTX, 89) + engines(FULL, 89, names=NETWORKS[:1]), RTX4090, (), RTX),
        (engines(INDUCTOR, 90), H100, (), INDUCTOR),
        (engines(INDUCTOR, 90) + engines(RTX, 86), H100, {FULL}, INDUCTOR),
        (engines(INDUCTOR, 90) + engines(FULL, 90, version="10.3.0"), H100, (), INDUCTOR),
        (engines(INDUCTOR, 90) + engines(FULL, 90), H100, (), FULL),
        (engines(INDUCTOR, 89) + engines(RTX, 89), RTX4090, (), RTX),
    ],
)
def test_auto_takes_the_engines_that_serve_the_device(entries, device, missing, flavour):
    choice, _, _ = select("auto", entries, device, missing)
    assert (choice.backend, choice.warning) == (flavour.value, "")
    assert {name: engine.file for name, engine in choice.engines.items()} == {
        name: f"engines/{name}/{flavour.value}" for name in NETWORKS
    }
    named, _, _ = select(flavour.value, entries, device, missing)
    assert named == choice


def test_a_library_is_imported_only_to_be_used():
    entries = engines(RTX, 89) + engines(FULL, 90)
    assert select("auto", entries, RTX4090)[1] == [RTX]
    assert select("auto", entries, H100)[1] == [FULL]
    assert select("tensorrt_rtx", entries, RTX4090)[1] == [RTX]
    # PyTorch is not imported if the bundle has no inductor engines for this GPU.
    with_inductor = engines(RTX, 86) + engines(INDUCTOR, 0) + engines(INDUCTOR, 80)
    assert INDUCTOR not in select("auto", with_inductor, H100)[1]
    assert select("inductor", with_inductor, None)[1] == [INDUCTOR]


@pytest.mark.parametrize(
    ("backend", "entries", "device", "looked"),
    [
        ("auto", (), H100, False),
        ("auto", engines(FULL, 90), None, True),
        ("auto", engines(INDUCTOR, 0), None, True),
        ("auto", engines(INDUCTOR, 0), H100, True),
        ("onnxruntime", engines(FULL, 90), H100, False),
    ],
)
def test_onnx_runtime_is_chosen_without_a_warning(backend, entries, device, looked):
    assert select(backend, entries, device) == (Choice("onnxruntime"), [], looked)


@pytest.mark.parametrize(
    ("entries", "device", "missing", "versions", "said"),
    [
        (
            engines(RTX, 86, 89),
            H100,
            {FULL},
            VERSIONS,
            "no engine of denoiser, vae_decoder for tensorrt_rtx 1.7.1 on sm90 (H100); the bundle has engines for "
            "tensorrt_rtx 1.7.1 on sm86,sm89: build the missing ones with python -m engines.build BUNDLE "
            "--target local",
        ),
        (
            engines(FULL, 90, names=NETWORKS[1:]),
            H100,
            (),
            VERSIONS,
            "no engine of denoiser for tensorrt 11.4.0 on sm90 (H100); the bundle has engines for tensorrt 11.4.0 on "
            "sm90: build the missing ones with python -m engines.build BUNDLE --target local",
        ),
        (
            engines(RTX, 89),
            RTX4090,
            (),
            {**VERSIONS, RTX: "1.8.0"},
            "no engine of denoiser, vae_decoder for tensorrt_rtx 1.8.0 on sm89 (RTX 4090); the bundle has engines for "
            "tensorrt_rtx 1.7.1 on sm89: build the missing ones with python -m engines.build BUNDLE --target sm89",
        ),
        (
            engines(RTX, 89),
            RTX4090,
            {RTX},
            VERSIONS,
            "backend tensorrt_rtx needs packages that are not installed: pip install tensorrt-rtx cuda-bindings",
        ),
        (
            engines(RTX, 89),
            RTX4090,
            {RTX, FULL},
            VERSIONS,
            "backend tensorrt_rtx needs packages that are not installed: pip install tensorrt-rtx cuda-bindings",
        ),
        (engines(FULL, 90), H100, (), {RTX: "1.7.1"}, "the Python package tensorrt cannot be loaded: no libnvinfer"),
        (
            engines(INDUCTOR, 80) + engines(INDUCTOR, 0),
            H100,
            {FULL, RTX},
            VERSIONS,
            "no engine of denoiser, vae_decoder for inductor 2.13.0 on sm90 (H100); the bundle has engines for "
            "inductor 2.13.0 on cpu; inductor 2.13.0 on sm80: build the missing ones with python -m export.build ... "
            "--target inductor",
        ),
    ],
)
def test_engines_that_do_not_serve_are_a_warning_and_an_error_where_the_flavour_is_named(
    entries, device, missing, versions, said
):
    choice, _, _ = select("auto", entries, device, missing, versions)
    assert choice == Choice("onnxruntime", warning=f"{said}; falling back to ONNX Runtime on the CPU")
    flavour = next(f for f in (RTX, FULL, INDUCTOR) if f.value in said)
    with pytest.raises((BundleError, InputError)) as caught:
        select(flavour.value, entries, device, missing, versions)
    assert str(caught.value) == said


def test_a_named_flavour_needs_engines_and_a_gpu():
    with pytest.raises(BundleError, match="the bundle has engines for no device"):
        select("tensorrt", ())
    with pytest.raises(InputError) as caught:
        select("tensorrt", engines(FULL, 90), None)
    assert str(caught.value) == (
        "backend tensorrt: this machine has no NVIDIA GPU (or no driver); onnxruntime runs on the CPU"
    )


def test_inductor_on_a_cpu_is_chosen_if_named():
    entries = engines(INDUCTOR, 0) + engines(FULL, 90)
    choice, _, _ = select("inductor", entries, None)
    assert (choice.backend, choice.warning) == ("inductor", "")
    assert {engine.capabilities for engine in choice.engines.values()} == {(0,)}
    for device, missing, versions, said in (
        (
            H100,
            (),
            VERSIONS,
            "for inductor 2.13.0 on sm90 .* engines for inductor 2.13.0 on cpu; tensorrt 11.4.0 on sm90: ",
        ),
        (
            None,
            (),
            VERSIONS | {INDUCTOR: "2.9.0"},
            "for inductor 2.9.0 on cpu .this machine's CPU.; .*export.build ... --target inductor",
        ),
        (None, {INDUCTOR}, VERSIONS, "^backend inductor needs packages that are not installed: pip install torch$"),
    ):
        with pytest.raises((BundleError, InputError), match=said):
            select("inductor", entries, device, missing, versions)


@pytest.mark.parametrize("entries", [(), engines(RTX, 86), engines(INDUCTOR, 0)])
def test_onnx_runtime_runs_on_the_gpu_where_it_can_and_no_engines_serve(entries):
    choice = chosen("auto", entries, Machine(provider=True))
    assert (choice.backend, choice.engines) == ("onnxruntime_cuda", None)
    assert choice.warning.endswith("; falling back to ONNX Runtime on the GPU") == (entries == engines(RTX, 86))
    assert chosen("auto", entries, Machine(None, provider=True)) == Choice("onnxruntime")
    assert chosen("onnxruntime", entries, Machine(provider=True)) == Choice("onnxruntime")


def test_engines_come_before_onnx_runtime_on_the_gpu():
    assert chosen("auto", engines(RTX, 90), Machine(provider=True)).backend == "tensorrt_rtx"
    assert chosen("auto", engines(INDUCTOR, 90), Machine(provider=True)).backend == "inductor"


def test_the_driver_is_not_asked_without_need():
    host = Machine()
    assert chosen("auto", (), host) == Choice("onnxruntime")
    assert host.looked == {"provider"}


@pytest.mark.parametrize(
    ("host", "said", "warns"),
    [
        (
            {"device": None, "provider": True},
            "this machine has no NVIDIA GPU (or no driver); onnxruntime runs on the CPU",
            False,
        ),
        ({}, "it is for CPUs only", False),
        ({"provider": "1.2 is too old: pip"}, "1.2 is too old: pip", True),
        (
            {"provider": True, "cuda": False},
            "needs packages that are not installed: pip install cuda-bindings",
            True,
        ),
    ],
)
def test_what_onnx_runtime_on_a_gpu_needs(host, said, warns):
    with pytest.raises(InputError) as caught:
        chosen("onnxruntime_cuda", (), Machine(**host))
    assert str(caught.value).removeprefix("backend onnxruntime_cuda").removeprefix(":").strip() == said
    warning = f"{caught.value}; falling back to ONNX Runtime on the CPU" if warns else ""
    assert chosen("auto", (), Machine(**host)) == Choice("onnxruntime", warning=warning)


def test_every_name_is_resolved():
    for name in NAMES:
        choice = chosen(name, engines(FULL, 90) + engines(RTX, 90) + engines(INDUCTOR, 90), Machine(provider=True))
        assert choice.backend == (name if name != "auto" else "tensorrt")


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ({"tensorrt", "tensorrt_rtx", "cuda.bindings.runtime", "torch"}, {}),
        ({"tensorrt_rtx", "cuda.bindings.runtime", "torch"}, {FULL: ("tensorrt",)}),
        ({"tensorrt", "torch"}, {FULL: ("cuda-bindings",), RTX: ("tensorrt-rtx", "cuda-bindings")}),
        ({"tensorrt", "tensorrt_rtx", "cuda.bindings.runtime"}, {INDUCTOR: ("torch",)}),
    ],
)
def test_missing_packages_of_this_host(monkeypatch, installed, missing):
    monkeypatch.setattr(selection, "is_installed", lambda module: module in installed)
    monkeypatch.setattr(selection, "local_device", lambda: H100)
    host = Host()
    assert (host.device, host.missing) == (H100, missing)
    assert host.has_cuda == ("cuda.bindings.runtime" in installed)
