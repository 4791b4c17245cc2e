"""Write the tables and plots of docs/benchmarks.md from the JSON in benchmarks/results: `python -m benchmarks.report`.

A table replaces the text between `<!-- report:NAME -->` and `<!-- /report -->`, where NAME is one of `BLOCKS`. A plot
is an SVG file beside its JSON file. `--check` writes nothing and fails if a table or plot is not up to date.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.plot import Bar, stacked_bars
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.files import atomic_write

PROGRAM = "benchmarks.report"
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"

Results = Mapping[str, Any]

_BLOCK = re.compile(r"(<!-- report:(\S+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
# Kinds of request and baselines of benchmarks.latency, in the order of the rows.
_REQUESTS: Mapping[str, str] = MappingProxyType(
    {
        "warm": "moma-rt: enrolled subject, new prompt",
        "warm_cached_prompt": "moma-rt: enrolled subject, prompt seen before",
        "warm_watched": "moma-rt: the same, with a callback a step",
        "cold": "moma-rt: new photo, new prompt",
    }
)
_BASELINES: Mapping[str, str] = MappingProxyType(
    {
        "eager": "the original's algorithm, PyTorch eager",
        "compiled": "the same, UNet and decoder in `torch.compile`",
        "plain": "Stable Diffusion without MoMA, PyTorch eager",
    }
)
# In the order in which they run. Long stages have colours of Okabe and Ito, which the colour-blind can tell apart.
_STAGES: Mapping[str, str] = MappingProxyType(
    {
        "images": "#f0e442",
        "vision_encoder": "#cc79a7",
        "language_model": "#d55e00",
        "context_projector": "#333333",
        "text_encoder": "#882255",
        "vae_encoder": "#56b4e9",
        "subject_encoder": "#e69f00",
        "denoiser": "#0072b2",
        "vae_decoder": "#009e73",
    }
)
_OTHER, _OTHER_COLOUR = "other", "#bbbbbb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.partition(": `")[0] + ".")
    p.add_argument(
        "--check", action="store_true", help="write nothing; exit with 2 if the page or a plot is not up to date"
    )
    p.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="page to update (default: docs/benchmarks.md)"
    )
    p.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="JSON files to read (default: benchmarks/results)"
    )
    options = p.parse_args(arguments)
    return run_command(PROGRAM, lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    wanted = rendered(options.page, options.results)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check and stale:
        names = ", ".join(path.name for path in stale)
        raise MomaError(f"out of date with {options.results}: {names}; run python -m {PROGRAM}")
    for path in stale:
        with atomic_write(path) as temporary:
            temporary.write_text(wanted[path], encoding="utf-8")
        print_output(str(path))
    return 0


def rendered(page: Path, results: Path) -> dict[Path, str]:
    """Return the up-to-date text of every generated file: the page and the plots.

    Raises:
        InputError: a file cannot be read or lacks an entry, or a block is not in `BLOCKS`.
    """
    plots: dict[Path, str] = {}

    def fill(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise InputError(f"{page} has a block report:{name}; there are: {', '.join(BLOCKS)}")
        text, made = BLOCKS[name](results, page.parent)
        plots.update(made)
        return f"{begin}{text}{end}"

    return {page: _BLOCK.sub(fill, _read(page))} | plots


def latency(results: Path, root: Path) -> tuple[str, dict[Path, str]]:
    """Return a paragraph, a table and an image link for each latency_*.json, and the plots by path."""
    parts, plots = [], {}
    for path in sorted(results.glob("latency_*.json")):
        try:
            measured = json.loads(_read(path))
            plot = path.with_suffix(".svg")
            parts += [latency_heading(measured, path.name), latency_table(measured)]
            parts.append(f"![where the time goes: {path.stem}]({_relative(plot, root)})")
            plots[plot] = latency_plot(measured)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} is no result of benchmarks.latency: {type(error).__name__}: {error}") from None
    return "".join(f"{part}\n\n" for part in parts).removesuffix("\n"), plots


def soak(results: Path, root: Path) -> tuple[str, dict[Path, str]]:
    """Return a table with one row for each soak_*.json, and no plots."""
    rows = []
    for path in sorted(results.glob("soak_*.json")):
        try:
            rows.append(soak_row(json.loads(_read(path)), path.name))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} is no result of benchmarks.soak: {type(error).__name__}: {error}") from None
    head = [
        "| on | requests | wrong | memory after 50 requests, most later | requests/s | latency p50, p99 |",
        "|---|---|---|---|---|---|",
    ]
    return "".join(f"{line}\n" for line in head + rows), {}


BLOCKS: Mapping[str, Callable[[Path, Path], tuple[str, dict[Path, str]]]] = MappingProxyType(
    {"latency": latency, "soak": soak}
)


def latency_heading(measured: Results, file: str) -> str:
    """Return a sentence about what was measured, and on which machine."""
    bundle, settings, where = measured["bundle"], measured["settings"], measured["environment"]
    machine = _machine(where)
    if settings["threads"] is not None:
        machine += f", {settings['threads']} {_plural('thread', settings['threads'])} on both sides"
    size, steps = bundle["image_size"], settings["steps"]
    language = "" if settings["language_model"] else ", a given embedding in place of the language model on both sides"
    guidance = f"guidance {settings['guidance_scale']:g}" if settings["guidance_scale"] != 1 else "no guidance"
    is_random = all(name.startswith("random weights") for name in bundle["sources"].values())
    weights = " with random weights" if is_random else ""
    agreement = measured["agreement"]
    agrees = f"; its pictures are the original's within {agreement['psnr_db']:g} dB PSNR" if agreement else ""
    if replay := measured.get("replay"):
        apart = replay["largest_difference"]
        same = "" if apart is None else f", its pictures within {apart}/255 of those of steps enqueued one by one"
        agrees += f"; a replayed step takes {replay['host_us_per_step']['p50']:.1f} us of the host{same}"
    return (
        f"`{bundle['base']}`{weights}, {bundle['precision']}, {size}x{size}, "
        f"{steps} {_plural('step', steps)} of {settings['scheduler']}, {guidance}{language}. "
        f"On **{machine}**, backend `{measured['backend']}`{agrees} (`benchmarks/results/{file}`):"
    )


def soak_row(measured: Results, file: str) -> str:
    """Return the table row of one soak run."""
    bundle, settings, used, latency = (measured[key] for key in ("bundle", "settings", "memory", "latency_ms"))
    on = f"{_machine(measured['environment'])}, `{measured['backend']}`, `{bundle['base']}` {bundle['precision']}"
    # The later maximum is the early maximum plus the growth.
    early = used["after_50"]
    memory = f"{early:.0f} MiB, {early + used['growth']:.0f} MiB{' of the GPU' if settings['on_gpu'] else ''}"
    asked = f"{measured['answered']} from {settings['threads']} threads"
    times = f"{latency['p50']:.0f} ms, {latency['p99']:.0f} ms"
    cells = (f"{on} (`{file}`)", asked, measured["wrong"], memory, f"{measured['requests_per_second']:.1f}", times)
    return f"| {' | '.join(map(str, cells))} |"


def latency_table(measured: Results) -> str:
    """Return a table with one row per request; the column "takes" is p50 relative to the warm request's."""
    runtime, repeats = measured["runtime"], measured["settings"]["repeats"]
    warm = runtime["requests"]["warm"]["total"]["p50"]
    lines = [
        f"| one picture, of {repeats} | p20 | p50 | p80 | takes | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for title, times, memory in _rows(measured):
        total = times["total"]
        numbers = " | ".join(_duration(total[p]) for p in ("p20", "p50", "p80"))
        lines.append(f"| {title} | {numbers} | {total['p50'] / warm:.2f}x | {_memory(memory)} |")
    return "\n".join(lines)


def latency_plot(measured: Results) -> str:
    """Return stacked bars of the stages' p50 in seconds, as SVG."""
    bars = []
    for title, times, _ in _rows(measured):
        parts = {stage: times["stages"].get(stage, {"p50": 0.0})["p50"] / 1000 for stage in _STAGES}
        parts[_OTHER] = max(0.0, times["total"]["p50"] / 1000 - sum(parts.values()))
        bars.append(Bar(title.replace("`", ""), parts))
    return stacked_bars(bars, "seconds", {**_STAGES, _OTHER: _OTHER_COLOUR})


def _rows(measured: Results) -> list[tuple[str, Results, Results]]:
    """Return title, times and memory of every request."""
    runtime, baselines = measured["runtime"], measured["baselines"]
    requests = runtime["requests"]
    rows = [(title, requests[kind], runtime) for kind, title in _REQUESTS.items() if kind in requests]
    return rows + [
        (t, baselines[name]["request"], baselines[name]) for name, t in _BASELINES.items() if name in baselines
    ]


def _machine(where: Results) -> str:
    gpu = where.get("gpu")
    return gpu["name"] if gpu else f"{where['cpu']}, {where['cores']} cores, no GPU"


def _duration(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 10_000 else f"{milliseconds:.0f} ms"


def _memory(memory: Results) -> str:
    device = f", device {memory['device_gb']:.1f} GB" if "device_gb" in memory else ""
    return f"{memory['peak_gb']:.1f} GB{device}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
