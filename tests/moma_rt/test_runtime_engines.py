"""Enrollment and generation on TensorRT engines, chosen as on a real GPU: fake networks on a fake GPU."""

import contextlib
import dataclasses
import threading
import warnings

import numpy as np
import pytest

from moma_rt.bundle.engines import Device, EngineEntry, Flavour
from moma_rt.bundle.manifest import Bundle, FileEntry, read_manifest, write_manifest
from moma_rt.cli import entry
from moma_rt.errors import BundleError, InputError, MomaError, MomaWarning, OutOfMemory
from moma_rt.files import sha256_file
from moma_rt.memory.networks import Networks
from moma_rt.runtime import Runtime
from moma_rt.schedulers.tables import ALL_TIMESTEPS
from moma_rt.timing import StageTimer
from tests.moma_rt.fake_gpu import FakeGpu
from tests.moma_rt.waiting import wait_until

H100 = Device("H100", 90)
PROMPTS = ("A car on a beach.", "A car.")


def add_engines(root, capability):
    """Give a bundle an engine of each network, for TensorRT 11.4.0."""
    manifest = read_manifest(root)
    engines, files = [], dict(manifest.files)
    for name, network in manifest.networks.items():
        file = f"engines/{name}/engine.trt"
        (root / file).parent.mkdir(parents=True)
        (root / file).write_bytes(b"engine of " + name.encode())
        files[file] = FileEntry(sha256_file(root / file), (root / file).stat().st_size)
        engines.append(
            EngineEntry(name, Flavour.TENSORRT, "11.4.0", (capability,), False, network.key, name, file, 7, None, None)
        )
    write_manifest(root, dataclasses.replace(manifest, engines=tuple(engines), files=files))
    return root


@pytest.fixture
def gpu(monkeypatch, fakes):
    networks = {b"engine of " + name.encode(): (spec, fakes.functions[name]) for name, spec in fakes.specs.items()}
    installed = FakeGpu.install(monkeypatch, networks)
    monkeypatch.setattr("moma_rt.backends.selection.local_device", lambda: H100)
    yield installed
    assert installed.cuda.wrong == []


@pytest.fixture
def bundle(tmp_path, fakes):
    return add_engines(fakes.make_bundle(tmp_path / "bundle"), H100.capability)


def pictures(runtime, subject):
    """Images and masks of several batch sizes, guided and not, to use buffers and scratch regions of many sizes."""
    results = [
        runtime.generate(subject, prompt, steps=3, num_images=count, guidance_scale=scale, guidance_interval=interval)
        for prompt, count, scale, interval in (
            (PROMPTS[0], 1, 7.5, ALL_TIMESTEPS),
            (PROMPTS[1], 6, 7.5, ALL_TIMESTEPS),
            (PROMPTS[0], 2, 1.0, ALL_TIMESTEPS),
            (PROMPTS[1], 5, 7.5, (300, 400)),
        )
    ]
    return [np.asarray(image) for r in results for image in r.images], [m for r in results for m in r.foreground_masks]


def test_engines_make_the_same_pictures(gpu, bundle, fakes, photo, mask):
    expected = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    runtime = Runtime.load(bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subjects = [r.enroll(photo, mask, "car") for r in (runtime, expected)]
    tensors = [s.inputs() | {"prefix": s.prefix.kv} for s in subjects]
    for name, tensor in tensors[1].items():
        np.testing.assert_array_equal(tensors[0][name], tensor)
    (images, masks), (wanted_images, wanted_masks) = pictures(runtime, subjects[0]), pictures(expected, subjects[1])
    assert len(images) == 14
    np.testing.assert_array_equal(images, wanted_images)
    # Reference tokens are padded with zeros, so sums have more terms.
    np.testing.assert_allclose(masks, wanted_masks, rtol=1e-5)
    assert gpu.cuda.launches == 1 + 2 + 1 + 2, "one graph launch per batch"


def test_out_of_memory_ends_a_call_and_not_the_runtime(gpu, bundle, photo, mask):
    runtime = Runtime.load(bundle, "tensorrt")
    subject = runtime.enroll(photo, mask, "car")
    expected = runtime.generate(subject, PROMPTS[0], steps=2).images[0]
    gpu.cuda.capacity = gpu.cuda.used + 20_000
    with pytest.raises(MomaError, match=r"cudaMalloc of \d+ bytes failed: cudaErrorMemoryAllocation"):
        runtime.generate(subject, PROMPTS[0], steps=2, num_images=4)
    found = runtime.generate(subject, PROMPTS[0], steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("lacking", [1, 20_000])
def test_a_call_that_runs_out_of_memory_frees_its_scratch_region(gpu, bundle, photo, mask, lacking):
    subject = Runtime.load(bundle, "tensorrt").enroll(photo, mask, "car")
    embedding = np.zeros(16)

    def generate():
        runtime = Runtime.load(bundle, "tensorrt")
        with contextlib.suppress(OutOfMemory):
            runtime.generate(
                subject, PROMPTS[0], steps=2, num_images=4, context_embedding=embedding, on_step=lambda _: None
            )
        return runtime

    runtime = generate()
    used = gpu.cuda.used
    del runtime
    gpu.cuda.capacity = used - lacking
    runtime = generate()
    assert runtime._networks.backend._shared.scratch.region is None
    gpu.cuda.capacity = used
    assert runtime.generate(subject, PROMPTS[0], steps=2, num_images=4, context_embedding=embedding).images


@pytest.mark.parametrize("method", ["deserialize_cuda_engine", "create_execution_context", "execute_async_v3"])
def test_out_of_memory_in_tensorrt_is_retried(gpu, bundle, photo, mask, method):
    runtime = Runtime.load(bundle, "tensorrt")
    subject = runtime.enroll(photo, mask, "car")
    expected = runtime.generate(subject, PROMPTS[0], steps=2).images[0]
    runtime = Runtime.load(bundle, "tensorrt")
    gpu.trt.reason = "out of memory"
    gpu.trt.refusals.add(method)
    found = runtime.generate(subject, PROMPTS[0], steps=2).images[0]
    assert gpu.trt.refusals == set()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_exactly_what_is_loaded_is_verified(gpu, bundle, photo, mask):
    """With engines, graphs are not read and may be altered; an altered engine is refused."""
    for path in (bundle / "networks").rglob("model.onnx"):
        path.write_text(path.read_text()[::-1])
    runtime = Runtime.load(bundle)
    subject = runtime.enroll(photo, mask, "car")
    path = bundle / "engines/denoiser/engine.trt"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match="engines/denoiser/engine.trt was altered"):
        runtime.generate(subject, PROMPTS[0], steps=1)


def test_onnx_runtime_reads_no_engine_and_no_lowered_graph(tmp_path, bundle, fakes, backend, photo, mask):
    manifest = read_manifest(bundle)
    networks = {}
    for name, network in manifest.networks.items():
        lowered = network.onnx.replace("model.onnx", "lowered.onnx")
        (bundle / lowered).write_text("altered")
        networks[name] = dataclasses.replace(network, lowered=lowered)
    files = manifest.files | {n.lowered: FileEntry("0" * 64, len("altered")) for n in networks.values()}
    write_manifest(bundle, dataclasses.replace(manifest, networks=networks, files=files))
    path = bundle / "engines/vae_encoder/engine.trt"
    path.write_bytes(path.read_bytes()[::-1])
    Runtime(Bundle.open(bundle), backend).enroll(photo, mask, "car")
    assert "vae_encoder" in backend.loads


def test_engines_for_another_device_are_a_warning(gpu, tmp_path, fakes):
    bundle = add_engines(fakes.make_bundle(tmp_path / "other"), 80)
    with pytest.warns(MomaWarning) as caught:
        runtime = Runtime.load(bundle)
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message).startswith("no engine of text_encoder, vae_encoder, ")
    assert str(warning.message).endswith("engines.build BUNDLE --target local; falling back to ONNX Runtime on the CPU")
    assert runtime._networks.backend.name == "onnxruntime"
    with pytest.raises(BundleError, match="no engine of text_encoder"):
        Runtime.load(bundle, "tensorrt")


def test_an_explicit_backend_is_not_replaced(monkeypatch, bundle):
    with pytest.raises(InputError, match="no backend 'abacus'; there are: auto, onnxruntime, onnxruntime_cuda, te"):
        Runtime.load(bundle, "abacus")
    monkeypatch.setattr("moma_rt.backends.selection.local_device", lambda: None)
    with pytest.raises(InputError, match="backend tensorrt: this machine has no NVIDIA GPU"):
        Runtime.load(bundle, "tensorrt")


def test_the_command_line_names_a_backend(gpu, bundle, tmp_path, photo, mask, capsys):
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    subject, out = tmp_path / "car.subject", tmp_path / "car.png"

    def run(*arguments):
        return entry([str(argument) for argument in arguments])

    enroll = ("enroll", bundle, tmp_path / "photo.png", tmp_path / "mask.png", "--name", "car", "--out", subject)
    assert run(*enroll, "--backend", "tensorrt", "--quiet") == 0
    assert run("generate", bundle, subject, PROMPTS[0], "--steps", 1, "--out", out, "--backend", "auto", "--quiet") == 0
    assert out.is_file()
    assert gpu.trt.contexts
    capsys.readouterr()
    assert run(*enroll, "--backend", "tensorrt_rtx") == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("moma-rt: error: ")
    assert found.err.count("\n") == 1
    assert run("generate", bundle, subject, PROMPTS[0], "--out", out, "--backend", "abacus") == 2
    assert "no backend 'abacus'; there are: auto, " in capsys.readouterr().err


@pytest.mark.parametrize("room", [1.2, 1.5, 1.8, 2.2, 2.6])
def test_a_batch_that_runs_out_of_memory_is_retried_one_by_one(gpu, bundle, photo, mask, room):
    runtime = Runtime.load(bundle, "tensorrt", max_batch=4)
    subject = runtime.enroll(photo, mask, "car")
    before = gpu.cuda.used
    expected = runtime.generate(subject, PROMPTS[0], steps=2).images[0].tobytes()
    one = gpu.cuda.used - before
    runtime._sampler._buffers.clear()
    runtime._networks.backend.trim()
    gpu.cuda.capacity = int(gpu.cuda.used + room * one)
    found, threads = [], []

    def work():
        try:
            found.append(runtime.generate(subject, PROMPTS[0], steps=2).images[0].tobytes())
        except MomaError as error:
            found.append(error)

    with runtime._queue.exclusive():
        for count in range(1, 5):
            threads.append(threading.Thread(target=work))
            threads[-1].start()
            wait_until(lambda count=count: len(runtime._queue._waiting) >= count)
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_weights_that_networks_share_are_hashed_once_and_again_when_they_change(fakes, tmp_path, backend, monkeypatch):
    root = fakes.make_bundle(tmp_path / "bundle")
    shared = "weights/denoiser/weights.safetensors"

    def share(data):
        data["networks"]["vae_decoder"]["weights"] = [shared]

    fakes.edit_manifest(root, share)
    hashed = []
    monkeypatch.setattr(
        "moma_rt.bundle.contents.sha256_file", lambda path: hashed.append(path.parent.name) or sha256_file(path)
    )
    networks = Networks(Bundle.open(root), backend)
    networks.get_all(("denoiser", "vae_decoder"), StageTimer())
    assert hashed.count("denoiser") == 2, "the graph and the weights; the decoder reads the same weights"
    assert backend.weights["vae_decoder"] == (root / shared,)
    (root / shared).write_text((root / shared).read_text()[::-1])
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{shared} was altered"):
            networks._load("denoiser", StageTimer())
