"""AOTInductor packages, compiled for this CPU: their content, and which weights they accept and refuse."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.build import main
from export.compare import outputs_of
from export.networks import NETWORKS
from export.packages import PackageOptions
from export.sample_inputs import sample_inputs, usual_sizes
from moma_rt.backends.inductor import InductorBackend
from moma_rt.backends.package_weights import CONSTANTS_MEMBER, WEIGHTS_MEMBER, LoadedWeights
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import BundleError

QUICK = "vae_encoder,context_projector"
WITH_UNET = "denoiser,subject_encoder"


def test_the_options_for_a_cpu_and_for_a_gpu():
    assert PackageOptions.of("denoiser", 0) == PackageOptions(False, channels_last=False, wrapper_level="O0")
    assert PackageOptions.of("denoiser", 90) == PackageOptions(True, channels_last=True, wrapper_level="O1")
    assert PackageOptions.of("denoiser", 90).settings["max_autotune"] is True


def test_only_networks_that_run_for_every_picture_are_autotuned():
    assert [name for name in NETWORKS if PackageOptions.of(name, 90).max_autotune] == ["denoiser", "vae_decoder"]
    assert PackageOptions.of("subject_encoder", 90) == PackageOptions(False, channels_last=True, wrapper_level="O0")


def test_every_setting_is_one_of_inductors():
    assert set(PackageOptions.of("denoiser", 90).settings) <= set(torch._inductor.config.get_config_copy())


def built(root: Path, only: str, seed: int, store: Path) -> Bundle:
    """Build a bundle with packages but without graphs, of random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.targets.local_device", lambda: None)
        options = ["--only", only, "--seed", str(seed), "--target", "inductor", "--store", str(store)]
        assert main(["--base", "tiny", *options, "--out", str(root)]) == 0
    return Bundle.open(root)


def packages(bundle: Bundle) -> dict[str, Path]:
    """Return the files of the packages by network."""
    return {engine.network: bundle.path(engine.file) for engine in bundle.manifest.engines}


def outputs(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """Run a network's package, on inputs that depend on its spec alone."""
    entry = bundle.network(name)
    inputs = sample_inputs(entry.spec, bundle.manifest.geometry, usual_sizes(entry.spec))
    return outputs_of("inductor", entry.spec, packages(bundle)[name], weights_of(bundle, name), inputs)


def weights_of(bundle: Bundle, name: str) -> tuple[Path, ...]:
    return tuple(map(bundle.path, bundle.network(name).weights))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def first(place) -> Bundle:
    return built(place / "first", QUICK, 0, place / "store")


def check_two_bases_share_their_code(first: Bundle, second: Bundle, alone: Bundle, only: str) -> None:
    """Check that `second` shares the packages of `first`, and computes bit for bit what those of `alone` do."""
    for name in only.split(","):
        code = packages(first)[name]
        assert code.samefile(packages(second)[name])
        assert not code.samefile(packages(alone)[name])
        found, expected, other = (outputs(bundle, name) for bundle in (second, alone, first))
        for tensor, wanted in expected.items():
            assert found[tensor].tobytes() == wanted.tobytes(), tensor
            assert other[tensor].tobytes() != wanted.tobytes() or not wanted.any(), "other weights, another output"


def test_two_bases_of_one_geometry_share_their_code(on_a_cpu, place, first, capsys):
    capsys.readouterr()
    second = built(place / "second", QUICK, 1, place / "store")
    said = [line for line in capsys.readouterr().err.splitlines() if "for inductor" in line]
    assert len(said) == 2
    assert all("kept for inductor cpu: another bundle had it" in line for line in said)
    check_two_bases_share_their_code(first, second, built(place / "alone", NAME, 1, place / "other store"), NAME)


@pytest.mark.slow
def test_two_bases_share_the_code_of_both_parts_of_the_unet(on_a_cpu, place):
    first, second = (built(place / f"unet-{seed}", WITH_UNET, seed, place / "unets") for seed in (0, 1))
    alone = built(place / "unet-alone", WITH_UNET, 1, place / "other unets")
    check_two_bases_share_their_code(first, second, alone, WITH_UNET)
    backend = InductorBackend(None)
    networks = [backend.load(first.network(n).spec, packages(first)[n], weights_of(first, n)) for n in packages(first)]
    held = [{w.tensor.data_ptr(): w.tensor.nbytes for w in network.weights.values()} for network in networks]
    shared = sum(held[0][address] for address in held[0].keys() & held[1].keys())
    (unet,) = {first.path(file) for n in packages(first) for file in first.network(n).weights if "/unet-" in file}
    # Only the denoiser has the layers after the last self-attention.
    assert 0.9 * unet.stat().st_size < shared <= unet.stat().st_size


@pytest.mark.parametrize("name", QUICK.split(","))
def test_a_package_holds_no_weights(first, name):
    """It contains no weight's first bytes, and lists the tensors of the weights file."""
    path, (file,) = packages(first)[name], weights_of(first, name)
    with zipfile.ZipFile(path) as archive:
        content = b"".join(archive.read(member) for member in archive.namelist())
        said = json.loads(archive.read(WEIGHTS_MEMBER))
        own = len(archive.read(CONSTANTS_MEMBER))
    stored = load_file(file)
    for tensor in stored.values():
        if tensor.nbytes >= 64 and len(tensor.unique()) > 8:
            assert tensor.numpy().tobytes()[:64] not in content
    assert own < 4096
    assert said["tensors"] == {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in stored.items()}
    assert said["channels_last"] is False


def test_a_build_for_inductor_alone_has_no_graphs(first):
    assert not first.manifest.has_graphs
    assert not list(first.root.glob("networks/*"))
    assert {path.suffix for path in first.root.rglob("*") if path.is_file()} == {".json", ".safetensors", ".pt2", ""}


def load(bundle: Bundle, name: str, package: Path | None = None, weights: tuple[Path, ...] | None = None):
    weights = weights_of(bundle, name) if weights is None else weights
    return InductorBackend(None).load(bundle.network(name).spec, package or packages(bundle)[name], weights)


NAME = "context_projector"


def refused(bundle: Bundle, **given) -> str:
    with pytest.raises(BundleError) as caught:
        load(bundle, NAME, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_named(on_a_cpu, first, tmp_path):
    (file,) = weights_of(first, NAME)
    tensors = load_file(file)
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, tmp_path / "w")
    assert f"asks for 1 weights that are not in {tmp_path / 'w'}: {dropped}; build the bundle again" in refused(
        first, weights=(tmp_path / "w",)
    )
    assert f"asks for {len(tensors)} weights that are not in the bundle: " in refused(first, weights=())
    others = weights_of(first, "vae_encoder")
    assert f"asks for {len(tensors)} weights that are not in {others[0]}: " in refused(first, weights=others)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor[..., :-1].contiguous(), "float32 [1023, 256]"),
        (lambda tensor: tensor.half(), "float16 [1024, 256]"),
        (lambda tensor: tensor.t().contiguous(), "float32 [256, 1024]"),
    ],
    ids=["width", "dtype", "transposed"],
)
def test_weights_of_another_geometry(on_a_cpu, first, tmp_path, change, said):
    (file,) = weights_of(first, NAME)
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].nbytes)
    tensors[name] = change(tensors[name])
    save_file(tensors, tmp_path / "w")
    had = f"{str(tensors[name].dtype).removeprefix('torch.')} {list(tensors[name].shape)}"
    found = refused(first, weights=(tmp_path / "w",))
    assert (
        f"was compiled for {name} float32 [1024, 256], and {tmp_path / 'w'} has it as {had}: the weights have another"
        in found
    )


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, None], ids=["empty", "text", "header", "cut"])
def test_invalid_weights_files(on_a_cpu, first, tmp_path, content):
    (file,) = weights_of(first, NAME)
    (tmp_path / "w").write_bytes(file.read_bytes()[:-4] if content is None else content)
    assert refused(first, weights=(tmp_path / "w",)).startswith(f"{tmp_path / 'w'} cannot be read as weights: ")
    (tmp_path / "w").unlink()
    assert refused(first, weights=(tmp_path / "w",)).startswith(f"{tmp_path / 'w'} cannot be read as weights: ")


@pytest.mark.parametrize("member", [WEIGHTS_MEMBER, CONSTANTS_MEMBER])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"tensors": {"x": 1}, "channels_last": true}'])
def test_a_package_with_missing_or_damaged_metadata(on_a_cpu, first, tmp_path, member, content):
    """PyTorch itself writes packages without these members."""
    with zipfile.ZipFile(packages(first)[NAME]) as source, zipfile.ZipFile(tmp_path / "p", "w") as target:
        for info in source.infolist():
            if not info.filename.endswith(member):
                target.writestr(info, source.read(info))
        if content is not None:
            target.writestr(member, content)
    assert refused(first, package=tmp_path / "p").startswith(f"{tmp_path / 'p'} is not an inductor package: ")


def test_unused_weights_are_not_loaded(on_a_cpu, first):
    every = (*weights_of(first, NAME), *weights_of(first, "vae_encoder"))
    network = load(first, NAME, weights=every)
    with safe_open(weights_of(first, NAME)[0], framework="np") as content:
        assert len(network.weights) == len(list(content.keys()))


def in_memory(content: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to memory, as for a device; for the CPU, weights are mapped from their file."""
    return content.clone()


def test_memory_is_freed_with_the_last_network_that_reads_it(on_a_cpu, first, monkeypatch):
    """PyTorch keeps the tensors, so their storage is freed."""
    new = LoadedWeights._new
    monkeypatch.setattr(LoadedWeights, "_new", lambda self, tensor, last: new(self, in_memory(tensor), last))
    backend, spec = InductorBackend(None), first.network(NAME).spec

    def network():
        return backend.load(spec, packages(first)[NAME], weights_of(first, NAME))

    networks = [network(), network()]
    tensors = [weight.tensor for weight in networks[0].weights.values()]
    assert [w.tensor.data_ptr() for w in networks[1].weights.values()] == [t.data_ptr() for t in tensors], "loaded once"
    sizes = [tensor.nbytes for tensor in tensors]
    for left in (True, False):
        networks.pop()
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == (sizes if left else [0] * len(sizes))
    again = network()
    assert all(weight.tensor.untyped_storage().nbytes() for weight in again.weights.values()), "read anew"


def test_a_mapped_file_is_mapped_once(on_a_cpu, first):
    """However often a network is loaded."""
    backend, spec = InductorBackend(None), first.network(NAME).spec
    maps = []
    for _ in range(4):
        network = backend.load(spec, packages(first)[NAME], weights_of(first, NAME))
        maps.append(sorted(weight.tensor.data_ptr() for weight in network.weights.values()))
        del network
    assert maps[0] == maps[1] == maps[2] == maps[3]


def test_a_bundle_with_a_changed_byte_of_weights_is_not_run(on_a_cpu, first, tmp_path, capsys):
    from moma_rt.memory.networks import Networks
    from moma_rt.timing import StageTimer

    root = Path(shutil.copytree(first.root, tmp_path / "bundle"))
    bundle = Bundle.open(root)
    (file,) = weights_of(bundle, NAME)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    bundle = Bundle.open(root)
    engines = {engine.network: engine for engine in bundle.manifest.engines}
    networks = Networks(bundle, InductorBackend(None), engines=engines)
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered: its SHA-256 is"):
        networks.run(NAME, {"embedding": np.zeros((1, 1024), np.float32)}, StageTimer())


def test_a_build_repairs_weights_and_compiles_nothing(on_a_cpu, first, tmp_path, monkeypatch):
    """With real packages: a bundle copied without its weights computes the same once they are written."""
    root = Path(shutil.copytree(first.root, tmp_path / "carried", ignore=shutil.ignore_patterns("weights")))
    monkeypatch.setattr("export.inductor_export.write_package", None)
    bundle = built(root, QUICK, 0, tmp_path / "store")
    assert dataclasses.replace(bundle, root=first.root) == first
    for name in QUICK.split(","):
        for tensor, wanted in outputs(first, name).items():
            assert outputs(bundle, name)[tensor].tobytes() == wanted.tobytes()
