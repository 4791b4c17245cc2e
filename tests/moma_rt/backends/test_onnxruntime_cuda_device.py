"""ONNX Runtime's CUDA provider on a real GPU, against its CPU kernels."""

import numpy as np
import pytest

from moma_rt.backends import create
from moma_rt.backends.libraries import has_cuda_provider
from moma_rt.errors import OutOfMemory
from moma_rt.memory.networks import run_once
from moma_rt.runtime import Runtime
from tests.moma_rt.backends.networks import STEP, allocate, buffer_of, save_graph
from tests.moma_rt.backends.test_tensorrt_device import CASES, random_inputs


@pytest.fixture
def backend():
    if not has_cuda_provider():
        pytest.skip("the installed onnxruntime is for CPUs only")
    return create("onnxruntime_cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "function", "sizes"), CASES)
def test_a_network_runs_at_two_alternating_sizes(backend, tmp_path, spec, function, sizes):
    network = backend.load(spec, save_graph(tmp_path / "model.onnx", spec))
    for inputs in [random_inputs(spec, **s) for s in sizes] * 2:
        found = run_once(backend, network, inputs)
        for name, output in function(inputs).items():
            np.testing.assert_array_equal(found[name], output)


@pytest.mark.gpu
def test_two_bindings_of_one_network_read_each_others_output(backend, tmp_path):
    network = backend.load(STEP, save_graph(tmp_path / "step.onnx", STEP))
    even = allocate(backend, STEP, batch=2)
    steps = [network.bind(even), network.bind({**even, "x": even["next_x"], "next_x": even["x"]})]
    for i in range(10):
        backend.upload(even["ids"], np.full((2, 3), i, np.int32))
        steps[i % 2].enqueue()
    assert (backend.download(even["x"]) == sum(range(10))).all()
    with pytest.raises(OutOfMemory):
        buffer_of(backend, (1 << 24, 1 << 20), "float32")
    backend.trim()
    steps[0].enqueue()
    assert (backend.download(even["next_x"]) == sum(range(11)) - 1).all()


@pytest.mark.gpu
def test_the_tiny_bundle_makes_the_cpus_pictures(backend, tiny_bundle, photo, mask):
    found, wanted = [], []
    for name, results in (("onnxruntime_cuda", found), ("onnxruntime", wanted)):
        runtime = Runtime.load(tiny_bundle, name)
        subject = runtime.enroll(photo, mask, "car")
        for options in ({"steps": 4}, {"steps": 4, "scheduler": "lcm", "guidance_scale": 1.0}, {"num_images": 3}):
            results += runtime.generate(subject, "A car on a beach.", **{"steps": 2, **options}).images
    assert len(found) == 5
    for image, expected in zip(found, wanted, strict=True):
        difference = np.asarray(image).astype(int) - np.asarray(expected)
        # TF32's rounding, over a few steps.
        assert 10 * np.log10(255**2 / max(1e-9, np.mean(difference**2))) > 40
