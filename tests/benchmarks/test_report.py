"""The tables and plots of a page show what the JSON says, and nothing else."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plot import Bar, stacked_bars, tick_step
from benchmarks.report import PAGE, RESULTS, latency_heading, latency_plot, latency_table, main, rendered
from moma_rt.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


def timed(p50: float, **stages: float) -> dict:
    return {
        "total": {"p20": p50 - 1, "p50": p50, "p80": p50 + 1},
        "stages": {name: {"p20": t, "p50": t, "p80": t} for name, t in stages.items()},
    }


def results() -> dict:
    requests = {
        "cold": timed(2000.0, denoiser=800.0, vae_encoder=900.0),
        "warm": timed(1000.0, denoiser=800.0),
        "warm_cached_prompt": timed(900.0, denoiser=800.0),
    }
    return {
        "environment": {"cpu": "Z80", "cores": 2},
        "bundle": {
            "base": "tiny",
            "precision": "fp32",
            "image_size": 256,
            "sources": {"unet": "random weights, seed 0"},
        },
        "settings": {
            "steps": 20,
            "scheduler": "ddim",
            "guidance_scale": 7.5,
            "repeats": 9,
            "threads": None,
            "language_model": True,
        },
        "backend": "onnxruntime",
        "runtime": {"peak_gb": 1.04, "requests": requests},
        "baselines": {"eager": {"peak_gb": 2.0, "device_gb": 3.26, "request": timed(12345.0, denoiser=9000.0)}},
        "agreement": {"psnr_db": 88.5, "foreground_difference": 0.0},
    }


@pytest.fixture
def place(tmp_path) -> Path:
    """A page with a block, and one result."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "latency_a.json").write_text(json.dumps(results()))
    (folder / "other.json").write_text("{}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("before\n<!-- report:latency -->\nold\n<!-- /report -->\nafter\n")
    return tmp_path


def report(place: Path, *options: str) -> int:
    return main(["--page", str(place / "docs/page.md"), "--results", str(place / "benchmarks/results"), *options])


def test_the_check_fails_until_the_report_is_made(place, capsys):
    assert report(place, "--check") == 2
    assert "page.md, latency_a.svg" in capsys.readouterr().err
    assert "old" in (place / "docs/page.md").read_text()
    assert report(place) == 0
    page = (place / "docs/page.md").read_text()
    assert page.startswith("before\n<!-- report:latency -->\n`tiny` with random weights")
    assert page.endswith("<!-- /report -->\nafter\n")
    assert "old" not in page
    assert "](../benchmarks/results/latency_a.svg)" in page
    assert report(place, "--check") == 0
    changed = results()
    changed["runtime"]["requests"]["warm"]["total"]["p50"] = 1001.0
    (place / "benchmarks/results/latency_a.json").write_text(json.dumps(changed))
    assert report(place, "--check") == 2


def test_a_plot_that_is_missing_fails_the_check(place):
    assert report(place) == 0
    (place / "benchmarks/results/latency_a.svg").unlink()
    assert report(place, "--check") == 2


def test_the_table_has_a_row_for_what_was_measured():
    assert latency_table(results()).splitlines()[2:] == [
        "| moma-rt: enrolled subject, new prompt | 999 ms | 1000 ms | 1001 ms | 1.00x | 1.0 GB |",
        "| moma-rt: enrolled subject, prompt seen before | 899 ms | 900 ms | 901 ms | 0.90x | 1.0 GB |",
        "| moma-rt: new photo, new prompt | 1999 ms | 2000 ms | 2001 ms | 2.00x | 1.0 GB |",
        "| the original's algorithm, PyTorch eager | 12.34 s | 12.35 s | 12.35 s | 12.35x | 2.0 GB, device 3.3 GB |",
    ]


def test_the_heading_says_what_was_measured():
    said = latency_heading(results(), "latency_a.json")
    assert "**Z80, 2 cores, no GPU**" in said
    assert "20 steps of ddim, guidance 7.5." in said
    assert "88.5 dB" in said
    assert "thread" not in said
    other = results()
    other["settings"] |= {"steps": 1, "guidance_scale": 1.0, "language_model": False, "threads": 1}
    other["environment"]["gpu"] = {"name": "NVIDIA H200"}
    other["bundle"]["sources"]["unet"] = "folder"
    other["agreement"] = None
    said = latency_heading(other, "latency_a.json")
    assert "1 step of ddim, no guidance, a given embedding in place of the language model" in said
    assert "**NVIDIA H200, 1 thread on both sides**" in said
    assert "random" not in said
    assert "dB" not in said
    other["replay"] = {"host_us_per_step": {"p50": 3.21}, "largest_difference": 0}
    said = latency_heading(other, "latency_a.json")
    assert "a replayed step takes 3.2 us of the host, its pictures within 0/255 of those of steps enqueued" in said
    other["replay"]["largest_difference"] = None
    assert "within" not in latency_heading(other, "latency_a.json")


def soaked() -> dict:
    return {
        "environment": {"cpu": "Z80", "cores": 2},
        "bundle": {"base": "tiny", "precision": "fp32"},
        "backend": "onnxruntime",
        "settings": {"threads": 8, "on_gpu": False},
        "answered": 1000,
        "wrong": 0,
        "memory": {"after_50": 400.4, "most": 409.5, "end": 400.0, "growth": 9.1},
        "requests_per_second": 3.456,
        "latency_ms": {"p50": 1234.5, "p99": 5000.0},
    }


def test_a_soak_is_a_row(place):
    (place / "benchmarks/results/soak_a.json").write_text(json.dumps(soaked()))
    on_gpu = soaked()
    on_gpu["environment"]["gpu"] = {"name": "NVIDIA H200"}
    on_gpu["settings"]["on_gpu"] = True
    (place / "benchmarks/results/soak_b.json").write_text(json.dumps(on_gpu))
    (place / "docs/page.md").write_text("<!-- report:soak -->\n<!-- /report -->\n")
    assert report(place) == 0
    assert (place / "docs/page.md").read_text().splitlines()[3:5] == [
        "| Z80, 2 cores, no GPU, `onnxruntime`, `tiny` fp32 (`soak_a.json`) | 1000 from 8 threads | 0 "
        "| 400 MiB, 410 MiB | 3.5 | 1234 ms, 5000 ms |",
        "| NVIDIA H200, `onnxruntime`, `tiny` fp32 (`soak_b.json`) | 1000 from 8 threads | 0 "
        "| 400 MiB, 410 MiB of the GPU | 3.5 | 1234 ms, 5000 ms |",
    ]
    assert report(place, "--check") == 0
    (place / "benchmarks/results/soak_a.json").write_text("{}")
    with pytest.raises(InputError, match="soak_a.json is no result of benchmarks.soak"):
        rendered(place / "docs/page.md", place / "benchmarks/results")


def test_the_plot_has_bars_as_long_as_the_times():
    root = ElementTree.fromstring(latency_plot(results()))
    bars = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    titles = [bar.find(f"{SVG}title").text for bar in bars]
    assert titles[:2] == ["denoiser: 0.8", "other: 0.2"]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.3)
    assert all(float(bar.get("x")) + float(bar.get("width")) <= 860 for bar in bars)


@pytest.mark.parametrize(
    ("longest", "step"), [(1.0, 0.2), (5.0, 1.0), (7.0, 2.0), (12.0, 5.0), (0.03, 0.01), (26.0, 10.0)]
)
def test_ticks_are_round(longest, step):
    assert tick_step(longest) == pytest.approx(step)


def test_labels_are_escaped_and_empty_parts_have_no_legend():
    colours = {"x": "#000000", "nothing": "#ffffff"}
    text = stacked_bars([Bar("a < b & c", {"x": 1.0, "nothing": 0.0})], "s", colours)
    assert "a &lt; b &amp; c" in text
    assert "nothing" not in text
    with pytest.raises(ValueError, match="at least one"):
        stacked_bars([Bar("a", {"x": 0.0})], "s", colours)
    with pytest.raises(ValueError, match="without a colour: y"):
        stacked_bars([Bar("a", {"x": 1.0, "y": 1.0})], "s", colours)


def test_a_stage_has_one_colour_in_all_plots():
    def colours_of(text: str) -> dict[str, str]:
        bars = [r for r in ElementTree.fromstring(text).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
        return {bar.find(f"{SVG}title").text.split(":")[0]: bar.get("fill") for bar in bars}

    fewer = results()
    del fewer["runtime"]["requests"]["cold"]
    found, of_fewer = colours_of(latency_plot(results())), colours_of(latency_plot(fewer))
    assert set(found) == {"vae_encoder", "denoiser", "other"}
    assert of_fewer == {name: found[name] for name in ("denoiser", "other")}
    # The longest stage is not grey.
    assert len({found["denoiser"][index : index + 2] for index in (1, 3, 5)}) > 1


def test_text_stays_within_the_plot():
    """By the widths of a wide sans-serif font: DejaVu takes 0.52 of its size a character, on average."""
    every = dict.fromkeys(("images", "vision_encoder", "context_projector", "subject_encoder", "vae_decoder"), 1.0)
    full = results()
    full["runtime"]["requests"]["warm_watched"] = timed(123456.0, **every, denoiser=100.0)
    for name in ("compiled", "plain"):
        full["baselines"][name] = full["baselines"]["eager"]
    root = ElementTree.fromstring(latency_plot(full))
    for text in root.iter(f"{SVG}text"):
        width, x = 0.56 * 13 * len(text.text), float(text.get("x"))
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        assert left >= 0, text.text
        assert left + width <= 860, text.text
        assert float(text.get("y")) < float(root.get("height"))


def test_an_unknown_block(place, capsys):
    (place / "docs/page.md").write_text("<!-- report:speed -->\n<!-- /report -->\n")
    assert report(place) == 2
    assert "report:speed; there are: latency, soak" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"bundle": {"sources": 1}}'])
def test_an_invalid_results_file(text, place):
    (place / "benchmarks/results/latency_a.json").write_text(text)
    with pytest.raises(InputError, match="latency_a.json is no result"):
        rendered(place / "docs/page.md", place / "benchmarks/results")


def test_a_missing_page(place, capsys):
    (place / "docs/page.md").unlink()
    assert report(place) == 2
    assert "cannot read" in capsys.readouterr().err


def test_the_repositorys_own_results_can_be_shown():
    assert PAGE in rendered(PAGE, RESULTS)
