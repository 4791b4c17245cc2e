"""The launches that compute-sanitizer watches; test_triton_kernel.py tests the kernels' results."""

import pytest
import torch

from benchmarks.kernels import sanitized_launches
from benchmarks.kernels.sanitized_launches import TOLERANCE, difference, launches, main


def test_the_launches_cover_edge_cases():
    partial, masked, cross = launches()
    assert partial[1][0].shape[1] % 128 != 0
    assert partial[1][5].shape[1] % 64 != 0
    gates = partial[1][6]
    assert (gates == 0).any()
    assert (gates != 0).any()
    # Head widths, by channels and heads.
    assert [launch[1][0].shape[2] // launch[2] for launch in (partial, masked)] == [40, 160]
    counts = (masked[1][5] != 0).sum(-1).tolist()
    assert counts == [0, 33, 70]
    assert cross[1][1].shape[1] == 111


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "benchmarks.kernels.sanitized_launches: error: needs a CUDA GPU, and PyTorch and Triton for it"
    ]


def test_a_rehearsal_computes_the_definition(capsys):
    assert main(["--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_half_precision_is_within_the_tolerance():
    partial, _, cross = launches()
    assert 0 < difference(partial, "cpu") < TOLERANCE / 4
    assert 0 < difference(cross, "cpu") < TOLERANCE / 4


@pytest.mark.parametrize(("found", "status"), [(0.0, 0), (1.0, 1), (float("nan"), 1)])
def test_a_wrong_result_is_a_failure(found, status, monkeypatch, capsys):
    monkeypatch.setattr(sanitized_launches, "gpu_name", lambda: "a GPU")
    differences = iter([found, 0.0, 0.0])
    monkeypatch.setattr(sanitized_launches, "difference", lambda launch, device: next(differences))
    assert main([]) == status
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith("wrong") == bool(status)
    assert len(rest) == 2
