"""A runtime whose networks are a few lines of NumPy each: its logic is tested without an export."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moma_rt.bundle.manifest import (
    LANGUAGE_TOKENIZER,
    TEXT_TOKENIZER,
    Bundle,
    FileEntry,
    Manifest,
    NetworkEntry,
    Source,
    write_manifest,
)
from moma_rt.bundle.specs import NetworkSpec, Precision
from moma_rt.files import sha256_file
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject
from tests.moma_rt.fake_networks import FUNCTIONS, GEOMETRY, LANGUAGE, LAYERS, MAX_BATCH, SPECS, Arrays


@dataclass
class FakeBound:
    network: "FakeNetwork"
    buffers: Mapping[str, np.ndarray]

    def enqueue(self) -> None:
        spec = self.network.spec
        with self.network.backend.alone():
            inputs = {t.name: self.buffers[t.name].copy() for t in spec.inputs}
            self.network.backend.runs.append((spec.name, inputs))
            outputs = FUNCTIONS[spec.name](inputs)
            for tensor in spec.outputs:
                assert outputs[tensor.name].shape == self.buffers[tensor.name].shape, tensor.name
                self.buffers[tensor.name][...] = outputs[tensor.name]


@dataclass
class FakeNetwork:
    spec: NetworkSpec
    backend: "FakeBackend"

    def bind(self, buffers: Mapping[str, np.ndarray]) -> FakeBound:
        with self.backend.alone():
            used = {t.name: buffers[t.name] for t in (*self.spec.inputs, *self.spec.outputs)}
            assert len({id(buffer) for buffer in used.values()}) == len(used), "overlapping buffers"
            self.backend.binds.append(self.spec.name)
            return FakeBound(self, used)


@dataclass
class FakeBackend:
    """Records what the runtime does: loads, allocations, uploads, binds, and every run with copies of its inputs.

    A second thread that enters it while a first one is inside sets `collided`, and fails.
    """

    name: str = "fake"
    supports_capture: bool = False
    is_host: bool = True
    survives_fork: bool = True
    loads: list[str] = field(default_factory=list)
    weights: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    allocations: list[tuple[int, ...]] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)
    uploads: list[tuple[int, ...]] = field(default_factory=list)
    runs: list[tuple[str, Arrays]] = field(default_factory=list)
    collided: threading.Event = field(default_factory=threading.Event)
    _inside: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        if not self._inside.acquire(blocking=False):
            self.collided.set()
            raise AssertionError("two threads in one backend")
        try:
            yield
        finally:
            self._inside.release()

    def load(self, spec: NetworkSpec, onnx: Path, weights: Sequence[Path] = ()) -> FakeNetwork:
        with self.alone():
            assert all(path.is_file() for path in (onnx, *weights))
            self.loads.append(spec.name)
            self.weights[spec.name] = tuple(weights)
            return FakeNetwork(spec, self)

    def allocate(self, wanted: Mapping) -> dict:
        with self.alone():
            self.allocations += (shape for shape, _ in wanted.values())
            return {key: np.zeros(shape, dtype) for key, (shape, dtype) in wanted.items()}

    def upload(self, buffer: np.ndarray, array: np.ndarray, row: int | None = None) -> None:
        with self.alone():
            target = buffer if row is None else buffer[row, ...]
            assert target.shape == array.shape
            self.uploads.append(array.shape)
            np.copyto(target, array, casting="same_kind")

    def copy_row(self, table: np.ndarray, row: int, target: np.ndarray) -> None:
        with self.alone():
            assert (table.shape[1:], table.dtype) == (target.shape, target.dtype)
            target[...] = table[row]

    def fill_row(self, target: np.ndarray, row: int, source: np.ndarray) -> None:
        with self.alone():
            assert (target.shape[2:], target.dtype) == (source.shape[1:], source.dtype)
            target[row, : len(source)] = source
            target[row, len(source) :] = 0

    def capture(self, enqueue: Callable[[], None]) -> None:
        raise AssertionError("this backend captures no graphs")

    def download(self, buffer: np.ndarray) -> np.ndarray:
        with self.alone():
            return buffer.copy()

    def limit_run_ahead(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def inputs_of(self, name: str) -> list[Arrays]:
        """The inputs of every run of a network so far."""
        return [inputs for ran, inputs in self.runs if ran == name]


def _byte_tokenizer(path: Path, special: tuple[str, ...], template: str) -> None:
    """Write a tokenizer with one token per byte, which all rules of moma_rt.inputs.tokenizers apply to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))


def make_bundle(root: Path, base: str = "fake", without: tuple[str, ...] = ()) -> Path:
    """A bundle folder for `FakeBackend`: real manifest, hashes and tokenizers, no graphs."""
    entries, files = {}, []
    for name, spec in SPECS.items():
        if name in without:
            continue
        onnx = f"networks/{name}/model.onnx"
        (root / onnx).parent.mkdir(parents=True)
        (root / onnx).write_text(f"{base} {name}")
        weights = f"weights/{name}/weights.safetensors"
        (root / weights).parent.mkdir(parents=True)
        (root / weights).write_text(f"weights of {base} {name}")
        files += [onnx, weights]
        entries[name] = NetworkEntry(spec, Precision.FP32, f"{base}-{name}", f"like {name}", onnx, onnx, (weights,))
    _byte_tokenizer(root / TEXT_TOKENIZER, ("<b>", "<e>"), "<b> $A <e>")
    _byte_tokenizer(root / LANGUAGE_TOKENIZER, ("<s>",), "<s> $A")
    files += [TEXT_TOKENIZER, LANGUAGE_TOKENIZER]
    hashes = {f: FileEntry(sha256_file(root / f), (root / f).stat().st_size) for f in files}
    roles = [role for role in ("unet", "adapters", "language") if role != "language" or "language_model" in entries]
    sources = tuple(Source(role, "hand-made", f"{base}-{role}") for role in roles)
    write_manifest(root, Manifest(base, "tests", GEOMETRY, entries, hashes, sources))
    return root


def edit_manifest(root: Path, change: Callable[[dict], None]) -> None:
    """Apply `change` to the manifest's JSON."""
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """This file's helpers, for tests that build their own bundles or compare with the fake networks."""
    return SimpleNamespace(
        make_bundle=make_bundle,
        edit_manifest=edit_manifest,
        FakeBackend=FakeBackend,
        geometry=GEOMETRY,
        layers=LAYERS,
        language=LANGUAGE,
        functions=FUNCTIONS,
        specs=SPECS,
        max_batch=MAX_BATCH,
    )


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def runtime(fake_bundle: Path, backend: FakeBackend) -> Runtime:
    return Runtime(Bundle.open(fake_bundle), backend)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """A rectangle off centre, so that rows and columns cannot be confused."""
    values = np.zeros((96, 96), np.uint8)
    values[24:48, 12:84] = 255
    return Image.fromarray(values)


@pytest.fixture
def subject(runtime: Runtime, backend: FakeBackend, photo: Image.Image, mask: Image.Image) -> Subject:
    """An enrolled "car"; the backend's lists of runs and allocations are empty again."""
    subject = runtime.enroll(photo, mask, "car")
    backend.runs.clear()
    backend.allocations.clear()
    return subject
