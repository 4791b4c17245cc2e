"""The kernel benchmark without a GPU: its measurements, summary, output and errors."""

import json

import pytest
import torch

from benchmarks.kernels import command as kernels
from benchmarks.kernels.attention_baselines import MASKED_SELF, Baseline
from benchmarks.kernels.attention_cases import CrossCase, SelfCase
from benchmarks.kernels.command import (
    Bench,
    command_line,
    default_name,
    line,
    main,
    measure,
    measure_compiled,
    measured,
    parser,
    summary,
)

NEVER = float("inf")


@pytest.fixture
def bench(fake_timer, peaks):
    return Bench(torch.float16, "cpu", fake_timer, peaks)


@pytest.fixture
def on_cpu(monkeypatch, tmp_path, fake_timer, peaks, tiny_cases, quick_compiler):
    """Run the command's cases on the CPU; returns its results by name."""
    written = {}

    def write(name, results):
        written[name] = json.loads(json.dumps(results))
        return tmp_path / f"{name}.json"

    monkeypatch.setattr(kernels, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "GpuTimer", lambda samples: fake_timer)
    monkeypatch.setattr(kernels, "measured_peaks", lambda timer, dtype, device: peaks)
    monkeypatch.setattr(kernels, "all_cases", lambda: tiny_cases)
    monkeypatch.setattr(kernels, "write_results", write)
    return written


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["benchmarks.kernels: error: needs a CUDA GPU, and PyTorch and Triton for it"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_a_name_of_results_is_no_path(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", name])
    assert stopped.value.code == 2
    assert "is not a name" in capsys.readouterr().err


def test_names_and_commands():
    plain, other = parser().parse_args([]), parser().parse_args(["--dtype", "bfloat16", "--tune", "--minutes", "2"])
    assert default_name("NVIDIA H100 80GB HBM3", plain) == "kernels_nvidia_h100_80gb_hbm3"
    assert default_name("NVIDIA H200", other) == "kernels_nvidia_h200_bfloat16_tuning"
    assert command_line(plain) == "python -m benchmarks.kernels --dtype float16"
    assert command_line(other) == "python -m benchmarks.kernels --dtype bfloat16 --minutes 2.0 --tune"
    assert vars(parser().parse_args(command_line(other).split()[3:])) == vars(other)


def test_a_case(tiny_cases, bench, quick_compiler):
    case = tiny_cases[2]
    found = measure(case, bench)
    assert list(found["measured"]) == ["moma", "sdpa"]
    found["measured"] |= measure_compiled(case, bench)
    assert list(found["measured"]) == ["moma", *(baseline.name for baseline in MASKED_SELF)]
    work = case.work()
    for result in found["measured"].values():
        assert result["ms"] == {"p20": 0.7, "p50": 1.0, "p80": 1.6}
        assert result["samples"] == 3
        # At the median of a millisecond.
        assert result["tflops"] == round(work.operations / 1e9, 2)
        assert result["gb_per_s"] == round(work.bytes / 1e6, 1)
        assert result["of_roofline"] == round(found["floor_ms"], 3)
        assert 0 < result["errors"][0] <= found["allowed_errors"][0]
    facts = {
        "form": "masked",
        "gate": "open",
        "share": 0.4,
        "kept_tokens": 7,
        "reference_tokens": 16,
        "open_queries": 16,
    }
    assert found | facts == found


def test_a_baseline_that_cannot_be_compiled_is_a_result(tiny_cases, bench, monkeypatch):
    def refuse(function):
        raise NotImplementedError("no power of two\nand a long story")

    monkeypatch.setattr("benchmarks.kernels.attention_baselines.compiled", refuse)
    found = measure_compiled(tiny_cases[2], bench)
    assert found["flex_compiled"] == found["sdpa_compiled"] == {"refused": "NotImplementedError: no power of two"}
    assert "ms" in measure(tiny_cases[2], bench)["measured"]["sdpa"]


def test_a_failing_eager_baseline_is_an_error(tiny_cases, bench, monkeypatch):
    def fail(inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels, "baselines", lambda case: [Baseline("definition", fail)])
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(tiny_cases[0], bench)


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_result_ends_the_run(which, wrong, tiny_cases, bench, monkeypatch):
    case = tiny_cases[which]
    right = type(case).moma

    def moma(self, inputs):
        first, *others = right(self, inputs)
        return (first * wrong, *others)

    monkeypatch.setattr(type(case), "moma", moma)
    with pytest.raises(SystemExit, match=rf"{case.operator}.*off by .* is allowed"):
        measure(case, bench)


def test_no_case_is_started_after_the_deadline(tiny_cases, bench, capsys):
    assert measured(tiny_cases, bench, deadline=0.0) == []
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_compiled_baselines_come_last_and_results_are_saved_after_every_case(tiny_cases, bench, monkeypatch):
    order, kept = [], []
    monkeypatch.setattr(kernels, "measure", lambda case, _: order.append("eager") or result(case, moma=1.0))
    monkeypatch.setattr(kernels, "measure_compiled", lambda case, _: order.append("compiled") or {"sdpa_compiled": {}})
    monkeypatch.setattr(kernels, "line", lambda result: "")
    found = measured(tiny_cases, bench, NEVER, lambda so_far: kept.append(json.loads(json.dumps(so_far))))
    assert order == ["eager"] * 3 + ["compiled"] * 3
    assert [len(one) for one in kept] == [1, 2, 3, 3, 3, 3]
    assert sum("sdpa_compiled" in one["measured"] for one in kept[3]) == 1
    assert kept[-1] == found


def result(case, **milliseconds):
    times = {name: {"refused": "x"} if ms is None else {"ms": {"p50": ms}} for name, ms in milliseconds.items()}
    return kernels.described(case) | {"measured": times}


def test_a_step_is_the_sum_of_its_layers(tiny_cases):
    level = tiny_cases[0].level
    # Three layers of each operator; of the definition and fused attention the faster one counts.
    times = {"sdpa": 4.0, "definition": 3.0, "sdpa_compiled": None, "definition_compiled": 2.0}
    cases = [
        result(CrossCase(level, 2, "soft"), moma=1.0, **times),
        result(SelfCase(level, 2, "soft", "packed", 0.4), moma=1.5, sdpa=3.0, sdpa_compiled=2.5),
        result(SelfCase(level, 2, "soft", "masked", 0.4), moma=2.0, sdpa=5.0, sdpa_compiled=None, flex_compiled=1.0),
        # Other rows and masks, which the summary leaves out.
        result(CrossCase(level, 8, "soft"), moma=100.0, **times),
        result(SelfCase(level, 2, "soft", "packed", 0.1), moma=100.0, sdpa=100.0, sdpa_compiled=100.0),
    ]
    rows = {(row["form"], row["gate"]): row for row in summary(cases)}
    packed = {
        "layers": 6,
        "moma_ms": 7.5,
        "eager_ms": 18.0,
        "compiled_ms": 13.5,
        "over_eager": 2.4,
        "over_compiled": 1.8,
    }
    assert rows["packed", "soft"] == {"form": "packed", "gate": "soft", **packed}
    masked = {"moma_ms": 9.0, "eager_ms": 24.0, "compiled_ms": None, "over_eager": 2.67, "over_compiled": None}
    assert rows["masked", "soft"] | masked == rows["masked", "soft"]
    assert rows["packed", "open"]["layers"] == 0


def test_the_whole_command(on_cpu, capsys):
    assert main(["--out", "mine"]) == 0
    results = on_cpu["mine"]
    assert list(results) == ["environment", "dtype", "peaks", "cases", "cases_left_out", "summary"]
    assert results["environment"]["command"].endswith("--out mine")
    assert (len(results["cases"]), results["cases_left_out"]) == (3, 0)
    out = capsys.readouterr().out.splitlines()
    assert out[-1].endswith("/mine.json")
    # Three layers of either operator, a millisecond each.
    row = out[-5].split()
    assert row == ["packed", "soft", "6", "6.00", "6.00", "6.00", "1.00", "1.00"]
    # Where no case was measured there is no ratio.
    assert out[-4].split() == ["packed", "open", "0", "0.00", "0.00", "0.00", "-", "-"]


def test_a_quick_run_and_one_that_is_cut_short(on_cpu):
    assert main(["--quick", "--dtype", "bfloat16"]) == 0
    results = on_cpu["kernels_nvidia_h200_bfloat16"]
    assert {case["rows"] for case in results["cases"]} == {2}
    assert main(["--minutes", "0"]) == 0
    assert on_cpu["kernels_nvidia_h200"]["cases_left_out"] == 3


def test_tuning_takes_the_place_of_the_measurement(on_cpu, monkeypatch, capsys):
    pytest.importorskip("triton")
    choice = {"launch": (64, 32, 4, 2), "gain": 1.25}
    tuning = [{"entry": "_CROSS[96]", "is_portable": True, "choices": [choice]}]
    monkeypatch.setattr("benchmarks.kernels.tuning.this_device", lambda: "device")
    monkeypatch.setattr(
        "benchmarks.kernels.tuning.tuned", lambda timer, dtype, device, keep: [*tuning] * (device == "device")
    )
    assert main(["--tune"]) == 0
    assert on_cpu["kernels_nvidia_h200_tuning"]["tuning"][0]["entry"] == "_CROSS[96]"
    first, path = capsys.readouterr().out.splitlines()
    assert first == "_CROSS[96]: LaunchConfig(64, 32, 4, 2)  # 1.25x as fast as now"
    assert path.endswith("_tuning.json")


def test_a_line_has_a_column_for_every_contender(tiny_cases, bench, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.kernels.attention_baselines.compiled", lambda function: None)
    (found,) = measured([tiny_cases[1]], bench, NEVER)
    heading, before, printed = capsys.readouterr().out.splitlines()
    assert printed.startswith(before)
    assert printed.startswith("injected_self 4² x 2 soft packed 40%")
    ends = {name: heading.index(name) + len(name) for name in ("moma", "sdpa", "sdpa_compiled", "floor")}
    assert printed[: ends["floor"]].endswith("0.0046")
    assert printed[: ends["moma"]].endswith("1.0000 (0%)")
    assert printed[: ends["sdpa"]].endswith(" 1.0000")
    assert printed[: ends["sdpa_compiled"]].endswith(" refused")
    # This case has no columns for the cross-attention's definition and for FlexAttention.
    assert line(found) == printed
    assert len(printed) == ends["sdpa_compiled"]
