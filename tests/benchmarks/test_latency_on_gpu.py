"""The script of the latency benchmark, with a python3 that only says what it was asked."""

import os
import subprocess

import pytest


@pytest.fixture
def asked(repository, tmp_path):
    """Run the script; returns its exit code and the commands it ran."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*" >>"$SAID"\n')
    python.chmod(0o755)

    def run(**variables):
        said = tmp_path / "said"
        said.write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "OUT": str(tmp_path / "out")}
        command = ["bash", str(repository / "benchmarks" / "latency_on_gpu.sh"), "bundle", "ddim"]
        done = subprocess.run(
            command, env=environment | {"SAID": str(said)} | variables, capture_output=True, text=True, check=False
        )
        return done.returncode, said.read_text().splitlines(), done.stderr

    return run


@pytest.mark.parametrize(
    ("variables", "precision", "target"),
    [
        ({}, "bf16", "inductor"),
        ({"BACKEND": "tensorrt"}, "bf16", "local"),
        ({"BACKEND": "tensorrt_rtx", "TARGET": "sm89", "PRECISION": "fp16"}, "fp16", "sm89"),
        ({"BACKEND": "onnxruntime_cuda"}, "fp16", "cpu"),
        ({"BACKEND": "onnxruntime_cuda", "PRECISION": "fp32"}, "fp32", "cpu"),
    ],
)
def test_a_backend_has_a_target_and_a_precision(asked, variables, precision, target):
    # The results that it would copy are not there.
    _, (bundle, ddim), _ = asked(**variables)
    assert f"--precision {precision} " in bundle
    assert f"--target {target} " in bundle
    assert f"--backend {variables.get('BACKEND', 'inductor')} " in ddim


def test_an_unknown_backend_is_refused(asked):
    assert asked(BACKEND="onnxruntime") == (
        2,
        [],
        "BACKEND onnxruntime; there are: inductor, tensorrt, tensorrt_rtx, onnxruntime_cuda\n",
    )
