"""The Nsight Compute step: its command, the parsing of its output, and its results."""

import json

import pytest

from benchmarks.gpu import counters
from benchmarks.gpu.counters import main, metrics, profiler, slowest
from moma_rt.errors import InputError, MomaError

SAID = """==PROF== Connected to process 12
2 steps
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","void a<int, 2>(x)","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","71.3"
"0","12","void a<int, 2>(x)","Occupancy","Registers Per Thread","register/thread","128"
"0","12","void a<int, 2>(x)","Occupancy","","",""
"""


def test_metrics_are_parsed_from_output_with_other_lines():
    assert metrics(SAID) == {"Compute (SM) Throughput": "71.3 %", "Registers Per Thread": "128 register/thread"}
    assert metrics("nothing\n") == {}


def test_the_three_slowest_kernels_are_selected_by_full_name(tmp_path, monkeypatch):
    assert slowest({"slowest": [{"name": name} for name in "abcd"]}) == ["a", "b", "c"]
    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/bin/{name}")
    command = profiler("void k<int, 2>(float*)")
    assert command[command.index("--kernel-name") + 1] == r"regex:^void k<int, 2>\(float\*\)$"
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="ncu is not on the PATH"):
        profiler("k")


def test_needs_the_step_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOMA_RT_RESULTS", str(tmp_path))
    assert main(["--bundle", "there"]) == 2
    assert "run the step profile first" in capsys.readouterr().err


def test_results_are_saved_after_every_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOMA_RT_RESULTS", str(tmp_path))
    monkeypatch.setattr(counters, "profiler", lambda name: ["ncu", name])
    (tmp_path / "profile.json").write_text(json.dumps({"slowest": [{"name": "a"}, {"name": "b"}]}))
    asked = []

    def output(command):
        asked.append(command)
        if len(asked) == 2:
            raise MomaError("ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM")
        return SAID

    monkeypatch.setattr(counters, "_output", output)
    assert main(["--bundle", "there"]) == 2
    assert "ERR_NVGPUCTRPERM" in capsys.readouterr().err
    assert asked[0][-4:] == ["benchmarks.gpu.counters", "steps", "--bundle", "there"]
    found = json.loads((tmp_path / "counters.json").read_text())
    assert [kernel["name"] for kernel in found["kernels"]] == ["a"]
    assert found["complete"] is False
