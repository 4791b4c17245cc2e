"""The soak benchmark: its summary, what makes it fail, and small runs of it."""

import json

import pytest
import torch

from benchmarks.soak import command, references, requests
from benchmarks.soak.command import SETTLED, Plan, main, memory, still_grows, summary, table, verdict
from benchmarks.soak.references import load_deterministic
from benchmarks.soak.requests import Kind
from benchmarks.soak.run import Outcome
from moma_rt.errors import MomaError


def picture(*differences: int, batch_id: float = 1.0, seconds: float = 0.1) -> Outcome:
    return Outcome(Kind.PICTURE, seconds, differences, (), batch_id)


def test_growth_is_counted_from_the_maximum_of_the_first_requests():
    early = [100.0, 300.0, *[250.0] * (SETTLED - 2)]
    assert memory(50.0, [*early, 280.0, 299.0]) == {
        "before": 50.0,
        "after_50": 300.0,
        "most": 300.0,
        "end": 299.0,
        "growth": -1.0,
        "most_of_each_50": [300.0, 299.0],
    }
    found = memory(50.0, [*early, 420.0, None, 310.0])
    assert (found["most"], found["end"], found["growth"]) == (420.0, 310.0, 120.0)
    assert found["most_of_each_50"] == [300.0, 420.0]
    with pytest.raises(MomaError, match="too few"):
        memory(50.0, [*early, None])


def test_the_summary_counts_requests_pictures_and_batches():
    answers = [
        picture(0, 1, batch_id=1.0, seconds=0.2),
        picture(0, batch_id=1.0, seconds=0.2),
        picture(3, batch_id=2.0, seconds=0.4),
        Outcome(Kind.CANCELLED, 0.1),
        Outcome(Kind.REFUSED, 0.1, wrong=("it was answered",)),
    ]
    found = summary(answers, 2.0)
    assert found["answered"] == 5
    assert found["kinds"] == {"picture": 3, "watched": 0, "cancelled": 1, "refused": 1, "enrolled": 0}
    assert found["pictures"] == 4
    assert found["pictures_at_a_time"] == 2.0
    assert found["differences"] == {"0": 2, "1": 1, "3": 1}
    assert found["wrong"] == 1
    assert found["requests_per_second"] == 2.5
    assert found["latency_ms"] == {"p50": 200.0, "p99": 396.0}


@pytest.fixture
def results() -> dict:
    settings = {"requests": 100, "threads": 8, "tolerance": 1, "growth_mib": 16.0, "on_gpu": True}
    return {
        "settings": settings,
        "closest_pair": {"difference": 40, "of": ["this one", "that one"]},
        "together": {"difference": 1, "allowed": 1},
        **summary([picture(0), picture(1)], 1.0),
        "memory": memory(0.0, [1000.0] * SETTLED + [1016.0]),
    }


def test_the_verdict_says_why_a_run_failed(results):
    assert verdict(results) == ""
    assert "GPU memory  1000 MiB after 50, most 1016, end 1016: growth 16, 16 allowed" in table(results)
    results["together"]["difference"] = 9
    assert verdict(results) == ("a picture generated in a batch is 9/255 from the one generated alone, 1 are allowed")
    results["together"]["difference"] = 0
    results["memory"]["growth"] = 16.1
    assert verdict(results) == "memory grew by 16.1 MiB after the first 50 requests, 16 are allowed"
    results |= {"wrong": 2, "what_is_wrong": ["request 7: it was answered", "request 9: KeyError"]}
    assert verdict(results).startswith("2 wrong: request 7: it was answered; memory grew")
    assert table(results).endswith("\n  request 7: it was answered\n  request 9: KeyError")


def test_steady_growth_fails_however_small(results):
    results["memory"]["most_of_each_50"] = [900.0, 1000.0, 1002.0, 1004.0, 1006.0, 1008.0]
    assert verdict(results) == "memory grew in each of the last 5 x 50 requests, to 1008 MiB"
    results["memory"]["most_of_each_50"][3] = 1002.0
    assert verdict(results) == ""
    assert not still_grows([1.0, 3.0, 5.0, 7.0, 9.0])


@pytest.mark.parametrize(
    ("batch", "on_gpu", "batches"), [(1, True, ()), (4, True, (2, 4)), (6, True, (2, 4)), (4, False, ())]
)
def test_batches_are_powers_of_two_where_graphs_are_captured(batch, on_gpu, batches):
    assert Plan(100, 8, batch, 0, 0, 2, 16.0, on_gpu, 0.0).batches == batches


def test_memory_is_sampled_rarely_if_that_takes_a_process(monkeypatch):
    plan = Plan(100, 8, 1, 0, 0, 2, 16.0, True, 0.0)
    monkeypatch.setattr(command, "device_mib_used", lambda: 7.0)
    monkeypatch.setattr(command, "device_mib_in_process", lambda: None)
    assert [plan.used_mib(number) for number in (0, 1, 9, 10)] == [7.0, None, None, 7.0]
    monkeypatch.setattr(command, "device_mib_in_process", lambda: 8.0)
    assert plan.used_mib(1) == 8.0


def test_references_that_are_too_similar_fail(results):
    results["closest_pair"]["difference"] = 2
    assert "this one and that one could be mixed up" in verdict(results)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests", "50"], "--requests 50: it must be 51 to"),
        (["--threads", "0"], "--threads 0"),
        (["--distinct", "1"], "--distinct 1"),
        (["--growth", "nan"], "--growth nan"),
        (["--tolerance", "-1"], "--tolerance -1"),
        (["--max-batch", "65"], "max_batch is 65"),
        (["--backend", "cuda"], "no backend 'cuda'"),
        ([], "not-there"),
    ],
)
def test_a_mistake_is_one_line(options, said, tmp_path, capsys):
    assert main(["--bundle", str(tmp_path / "not-there"), *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_bundle_that_cannot_enroll_is_refused(small_bundles, capsys):
    _, making = small_bundles
    assert main(["--bundle", str(making), "--backend", "inductor"]) == 2
    assert "encoder" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "measures"), [("inductor", False), ("onnxruntime", True)])
def test_every_process_chooses_the_same_convolutions(backend, measures, monkeypatch):
    """Loading the inductor backend lets cuDNN time convolutions, which may choose others in each process."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def load(bundle, name, **limits):
        torch.backends.cudnn.benchmark = True
        return bundle, name, limits

    monkeypatch.setattr(references.Runtime, "load", load)
    assert load_deterministic("there", backend, max_batch=2) == ("there", backend, {"max_batch": 2})
    assert torch.backends.cudnn.benchmark is measures


@pytest.fixture
def written_here(tmp_path, monkeypatch):
    """Make the command write its results to a temporary folder; returns the folder."""

    def write(name, results):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(results))
        return path

    monkeypatch.setattr(command, "write_results", write)
    return tmp_path


@pytest.fixture
def few(monkeypatch) -> list[str]:
    """Options of a run of 24 requests with many of each kind."""
    monkeypatch.setattr(command, "SETTLED", 8)
    shares = dict.fromkeys((Kind.WATCHED, Kind.CANCELLED, Kind.REFUSED, Kind.ENROLLED), 15)
    monkeypatch.setattr(requests, "_SHARES", shares)
    return ["--backend", "onnxruntime", "--requests", "24", "--growth", "1000", "--threads", "3"]


def test_a_small_run(tiny_bundle, written_here, few, capsys):
    options = ["--bundle", str(tiny_bundle), *few, "--distinct", "6", "--seed", "1", "--out", "small"]
    assert main(options) == 0
    found = json.loads((written_here / "small.json").read_text())
    assert found["answered"] == sum(found["kinds"].values()) == 24
    assert all(found["kinds"].values())
    assert found["wrong"] == 0
    assert found["pictures"] == sum(found["differences"].values()) >= 6
    assert set(found["differences"]) <= {"0", "1"}
    assert found["settings"]["tolerance"] == 1
    assert found["settings"]["on_gpu"] is False
    assert 0 < found["memory"]["before"] < found["memory"]["after_8"]
    assert "small.json" in capsys.readouterr().out
    assert str(tiny_bundle) not in found["environment"]["command"]


def test_a_run_in_which_requests_are_mixed_up(tiny_bundle, written_here, few, monkeypatch, capsys):
    """Every request is compared with the references of the other one."""
    made_alone = command.references
    monkeypatch.setattr(command, "references", lambda *given: made_alone(*given)[::-1])
    assert main(["--bundle", str(tiny_bundle), *few, "--distinct", "2", "--out", "mixed"]) == 1
    captured = capsys.readouterr()
    found = json.loads((written_here / "mixed.json").read_text())
    assert found["wrong"] == found["pictures"] >= 6
    assert captured.err.count("\n") == 1
    assert "it is 0 from picture 1 of request" in captured.err
