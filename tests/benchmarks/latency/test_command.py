"""The latency benchmark: its requests, summary and errors, and small runs of it."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.latency import command as latency
from benchmarks.latency.command import KINDS, main, measure
from benchmarks.latency.contenders import ContenderProcess
from benchmarks.latency.requests import RUNTIME, Answer, Settings, requests
from benchmarks.latency.summary import Samples, summary, table, times
from benchmarks.report import latency_table
from moma_rt.errors import MomaError
from moma_rt.runtime import Runtime


def answer(seconds: float, grey: int = 100, **stages: float) -> Answer:
    return Answer(seconds, stages, np.full((4, 4, 3), grey, np.uint8), np.zeros((4, 4), np.float32))


def settings(bundle, **others) -> Settings:
    options = latency.parser().parse_args(["--bundle", str(bundle)])
    return Settings(bundle, "onnxruntime", 1, "ddim", None, options, **others)


def test_the_requests_of_each_kind():
    turns = [requests(turn) for turn in range(81)]
    assert all(list(turn) == list(KINDS) for turn in turns)
    cold, warm, cached, watched = ([turn[kind] for turn in turns] for kind in KINDS)
    assert len({(r.name, r.subject_seed) for r in warm + cached}) == 1
    assert [r.prompt for r in cached] == [r.prompt for r in warm]
    assert [dataclasses.replace(r, is_watched=False) for r in watched] == warm
    assert all(r.is_watched for r in watched)
    assert len({r.prompt for r in warm}) == len({r.name for r in cold}) == len({r.prompt for r in cold}) == 81
    assert len({r.seed for r in cold + warm + cached}) == 3 * 81


def test_times_are_milliseconds_and_count_a_skipped_stage_as_zero():
    measured = times([answer(1.0, denoiser=0.5), answer(2.0, denoiser=0.7, text_encoder=0.2), answer(3.0)])
    assert measured["total"] == {"p20": 1400.0, "p50": 2000.0, "p80": 2600.0}
    assert measured["stages"]["denoiser"]["p50"] == 500.0
    assert measured["stages"]["text_encoder"]["p50"] == 0.0


@pytest.fixture
def samples() -> dict[str, Samples]:
    ours = {"cold": [answer(2.0)], "warm": [answer(1.0, denoiser=0.9)], "warm_cached_prompt": [answer(0.8)]}
    return {
        RUNTIME: Samples(ours, 1.234, 3.0),
        "eager": Samples({"warm": [answer(1.5, 101, denoiser=1.0)]}, 2.0, None),
    }


def test_the_summary_compares_with_each_kind_of_request(samples):
    found = summary(samples)
    assert found["baselines"]["eager"]["runtime_is_faster"] == {
        "cold": 0.75,
        "warm": 1.5,
        "warm_cached_prompt": 1.88,
    }
    assert found["runtime"]["peak_gb"] == 1.23
    assert found["runtime"]["device_gb"] == 3.0
    assert "device_gb" not in found["baselines"]["eager"]
    replay = {"host_us_per_step": {"p50": 3.21}, "largest_difference": 1}
    shown = table({**found, "agreement": {"psnr_db": 48.1}, "replay": replay})
    assert "1000.0" in shown
    assert "1500.0" in shown
    assert "0.75, 1.50, 1.88" in shown
    assert "48.1 dB" in shown
    assert "replays: 3.21 us of the host a step (p50); at most 1/255" in shown
    assert "replays" not in table({**found, "agreement": None, "replay": None})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repeats", "0"], "--repeats 0"),
        (["--steps", "0"], "steps must be 1 to 999"),
        (["--scheduler", "lcm", "--steps", "51"], "1 to 50"),
        (["--baselines", "eager,fast"], "fast"),
        (["--requests", "hot"], "hot"),
        (["--backend", "cuda"], "no backend 'cuda'"),
        (["--threads", "0"], "threads is 0"),
        ([], "not-there"),
    ],
)
def test_a_mistake_is_one_line(options, said, tmp_path, capsys):
    assert main(["--bundle", str(tmp_path / "not-there"), *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_runtime_is_measured_without_pytorch(repository):
    # What a contender's process imports before it knows which contender it is.
    code = "import sys, benchmarks.latency.command, benchmarks.latency.contenders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0


def test_an_error_in_a_contenders_process_is_raised(tmp_path):
    with pytest.raises(MomaError, match=r"moma-rt: .*is not there"):
        ContenderProcess(RUNTIME, settings(tmp_path / "is not there"))


def test_a_killed_contender_is_reported(tiny_bundle):
    contender = ContenderProcess(RUNTIME, settings(tiny_bundle))
    contender._process.kill()
    contender._process.join()
    with pytest.raises(MomaError, match="process was killed"):
        contender._receive()


def test_pictures_that_disagree_fail_the_run(tiny_bundle, monkeypatch, capsys):
    ours, eager = ({kind: [answer(1.0, grey)] for kind in KINDS} for grey in (0, 200))
    monkeypatch.setattr(latency, "measure", lambda *_: {RUNTIME: Samples(ours), "eager": Samples(eager)})
    monkeypatch.setattr(latency, "device_mib_used", lambda: None)
    written = []
    monkeypatch.setattr(latency, "write_results", lambda *arguments: written.append(arguments))
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime"]) == 2
    assert "not the same algorithm" in capsys.readouterr().err
    assert written == []
    # Other schedulers than ddim draw their own noise in every step, so pictures are not compared.
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--scheduler", "lcm", "--steps", "4"]) == 0
    assert written[0][1]["agreement"] is None
    # On a GPU the agreement is only reported: in bfloat16, random weights make other pictures.
    monkeypatch.setattr(latency, "device_mib_used", lambda: 1.0)
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime"]) == 0
    assert written[1][1]["agreement"]["psnr_db"] < 10


def test_replayed_pictures_that_differ_fail_once_they_are_written(tiny_bundle, monkeypatch, capsys):
    ours = {kind: [dataclasses.replace(answer(1.0), replay_seconds=1e-4)] for kind in KINDS}
    ours["warm_watched"] = [answer(1.0, 103)]
    monkeypatch.setattr(latency, "measure", lambda *_: {RUNTIME: Samples(ours)})
    written = []
    monkeypatch.setattr(latency, "write_results", lambda *arguments: written.append(arguments))
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--steps", "50"]) == 1
    assert written[0][1]["replay"]["largest_difference"] == 3
    assert written[0][1]["replay"]["host_us_per_step"]["p50"] == 2.0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "a replayed picture is 3/255 from" in captured.err


@pytest.mark.parametrize(("gpu", "watched"), [(None, False), (1.0, True)])
def test_the_watched_request_is_a_default_only_on_a_gpu(gpu, watched, monkeypatch):
    monkeypatch.setattr(latency, "device_mib_used", lambda: gpu)
    assert ("warm_watched" in latency._kinds(None)) == watched
    assert latency._kinds("warm_watched") == ("warm", "warm_watched")


class FakeContender:
    """Answers at once."""

    def __init__(self, name, settings):
        self.asked = 0

    def answer(self, request):
        return answer(1.0)

    def device_gb(self):
        return None

    def peak_gb(self):
        return 1.0

    def end(self):
        pass


def test_no_repetition_starts_after_the_deadline(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "ContenderProcess", FakeContender)
    asked = []

    def is_over():
        asked.append(1)
        return len(asked) > 2

    samples = measure(settings(tmp_path), ("warm",), ("eager",), 9, is_over)
    assert [len(samples[name].answers["warm"]) for name in (RUNTIME, "eager")] == [3, 3]
    # The first one is made in any case.
    assert len(measure(settings(tmp_path), ("warm",), (), 9, lambda: True)[RUNTIME].answers["warm"]) == 1


def test_samples_are_saved_after_every_repetition(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "ContenderProcess", FakeContender)
    kept = []

    def keep(samples):
        kept.append([(len(of.answers["warm"]), of.peak_gb) for of in samples.values()])

    measure(settings(tmp_path), ("warm",), ("eager",), 3, lambda: False, keep)
    assert kept == [[(turn, 1.0)] * 2 for turn in (1, 2, 3)]


@pytest.fixture
def written_here(tmp_path, monkeypatch):
    """Make the command write its results to a temporary folder; returns the folder."""

    def write(name, results):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(results))
        return path

    monkeypatch.setattr(latency, "write_results", write)
    return tmp_path


def test_without_the_cold_request_nothing_is_enrolled(tiny_bundle, written_here):
    options = ["--steps", "1", "--repeats", "2", "--baselines", "none", "--requests", "warm_watched", "--out", "warm"]
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime", *options]) == 0
    found = json.loads((written_here / "warm.json").read_text())
    assert set(found["runtime"]["requests"]) == {"warm", "warm_watched"}
    assert found["replay"] is None
    assert "subject_encoder" not in found["runtime"]["requests"]["warm"]["stages"]
    assert found["baselines"] == {}
    assert latency_table(found).count("\n") == 3


def test_a_saved_subject_is_used_as_it_is(tiny_bundle, small_bundles, written_here, capsys):
    """The subject keeps its name and nothing is enrolled; a subject of another bundle is refused."""
    photo, mask = (requests(0)["warm"].photo, requests(0)["warm"].mask)
    runtime = Runtime.load(tiny_bundle, "onnxruntime")
    runtime.enroll(photo, mask, "red mug").save(written_here / "mug.subject")
    options = ["--subject", str(written_here / "mug.subject"), "--steps", "1", "--repeats", "1", "--backend"]
    assert main(["--bundle", str(tiny_bundle), *options, "onnxruntime", "--baselines", "plain", "--out", "mug"]) == 0
    found = json.loads((written_here / "mug.json").read_text())
    assert set(found["runtime"]["requests"]) == {"warm", "warm_cached_prompt"}
    assert "subject_encoder" not in found["runtime"]["requests"]["warm"]["stages"]
    # The baselines use another photo.
    assert found["agreement"] is None
    assert found["settings"]["baseline_precision"] == "fp32"
    assert found["settings"]["baseline_memory_format"] == "channels_first"
    capsys.readouterr()
    for bundle, more, said in (
        (small_bundles[1], [], "enroll its photo with this bundle"),
        (tiny_bundle, ["--requests", "cold,warm"], "--requests cold,warm: with --subject nothing is enrolled"),
    ):
        backend = "inductor" if bundle is small_bundles[1] else "onnxruntime"
        assert main(["--bundle", str(bundle), *options, backend, *more]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1
    (written_here / "mug.subject").write_bytes(b"x")
    assert main(["--bundle", str(tiny_bundle), *options, "onnxruntime"]) == 2
    assert "not a subject file" in capsys.readouterr().err


def test_a_small_run(tiny_bundle, written_here, capsys):
    options = ["--steps", "1", "--repeats", "1", "--baselines", "eager,plain", "--threads", "2", "--out", "small"]
    options += ["--requests", "cold,warm,warm_cached_prompt"]
    assert main(["--bundle", str(tiny_bundle), "--backend", "onnxruntime", *options]) == 0
    found = json.loads((written_here / "small.json").read_text())
    assert str(tiny_bundle) not in found["environment"]["command"]
    assert found["agreement"]["psnr_db"] > 60
    assert found["settings"]["language_model"] is True
    stages = {kind: set(measured["stages"]) for kind, measured in found["runtime"]["requests"].items()}
    generated = {"denoiser", "vae_decoder"}
    of_prompt = {"text_encoder", "language_model", "context_projector"}
    assert stages["warm_cached_prompt"] == generated
    assert stages["warm"] == generated | of_prompt
    of_subject = {"vae_encoder", "subject_encoder", "vision_encoder"}
    assert stages["cold"] == generated | of_prompt | of_subject
    assert set(found["baselines"]["eager"]["request"]["stages"]) == stages["cold"] | {"images"}
    assert set(found["baselines"]["plain"]["request"]["stages"]) == generated | {"text_encoder"}
    for measured in (*found["runtime"]["requests"].values(), found["baselines"]["eager"]["request"]):
        assert 0 < sum(stage["p50"] for stage in measured["stages"].values()) <= measured["total"]["p50"]
    assert 0 < found["runtime"]["peak_gb"] < found["baselines"]["eager"]["peak_gb"]
    assert latency_table(found).count("\n") == 6
    assert "small.json" in capsys.readouterr().out
