"""Score a bundle's pictures of 50 unseen subjects, in contexts and materials: `python -m benchmarks.quality BUNDLE`.

Runs on the deployed bundle through the runtime, so that every precision, scheduler and number of steps can be compared.
Small networks, trained on renders, are the judges (`python -m benchmarks.quality.scorers`):

    prompt      the picture shows the context that was asked for
    texture     the subject is of the material that was asked for
    subject     the photo of the own subject, of 50, is the nearest to the picture's subject; chance is 0.02
    foreground  the model's last foreground mask fits the subject that the picture shows

Each comes with a 95 % bootstrap interval over subjects. Ablations take one thing away, and are compared by subject.
Writes NAME.json, and NAME.html with the pictures.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.environment import bundle_facts, environment, results_path, write_results
from benchmarks.quality.cases import ABLATIONS, CONTEXT, FULL, KEYS, TEXTURE
from benchmarks.quality.evaluation import Selection, evaluate
from benchmarks.quality.generation import Maker
from benchmarks.quality.judge import Judge
from benchmarks.quality.options import (
    NONE,
    add_bundle_options,
    add_setup_options,
    load_runtime,
    names,
    selection_of,
    setup_of,
    shareable,
    subject_count,
)
from benchmarks.quality.page import page
from benchmarks.quality.scorers.scorer import Scorers
from benchmarks.quality.scores import Scores, paired_difference
from benchmarks.quality.subjects import COUNT, load_subjects
from moma_rt.backends.selection import Host, choose
from moma_rt.errors import print_output, run_command
from moma_rt.files import atomic_write

PROGRAM = "benchmarks.quality"
_ALL = "all"
_QUICK = Selection(4, ("beach", "night", "brick"), ("gold",))
_QUICK_STEPS = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_options(p)
    add_setup_options(p)
    p.add_argument("--subjects", type=int, default=COUNT, metavar="N", help=f"the first N subjects (default: {COUNT})")
    p.add_argument(
        "--contexts",
        default=",".join(KEYS[CONTEXT]),
        metavar="NAMES",
        help=f"contexts, separated by commas, or {NONE} (default: {','.join(KEYS[CONTEXT])})",
    )
    p.add_argument(
        "--textures",
        default=",".join(KEYS[TEXTURE]),
        metavar="NAMES",
        help=f"materials, separated by commas, or {NONE} (default: {','.join(KEYS[TEXTURE])})",
    )
    p.add_argument(
        "--ablation",
        default=NONE,
        metavar="NAMES",
        help=f"ablations to run as well, separated by commas, or {_ALL} (default: {NONE}; there are: "
        f"{', '.join(ABLATIONS)})",
    )
    p.add_argument(
        "--ablation-subjects", type=int, metavar="N", help="subjects of each ablation (default: those of --subjects)"
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help=f"only {_QUICK.count} subjects, {len(_QUICK.keys)} pictures each, {_QUICK_STEPS} steps: does it run?",
    )
    p.add_argument(
        "--out",
        default="quality",
        metavar="NAME",
        help="write benchmarks/results/NAME.json and .html (default: quality)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _evaluate(options, given))


def _evaluate(options: argparse.Namespace, given: Sequence[str]) -> int:
    ablations = names("--ablation", "ablation", _expanded(options.ablation), tuple(ABLATIONS))
    if options.quick:
        options.steps = _QUICK_STEPS
    setup, selection = setup_of(options), _QUICK if options.quick else selection_of(options)
    ablated = selection.count if options.ablation_subjects is None else options.ablation_subjects
    # Taken before the pictures are made, since the commit is that of the code loaded now.
    where = environment(shareable(PROGRAM, given, options.bundle))
    runtime, subjects, scorers = load_runtime(options), load_subjects(), Scorers()
    maker, judge = Maker(runtime, subjects, options.max_batch), Judge(scorers, subjects)
    # An ablation is not about textures.
    few = Selection(min(selection.count, subject_count(ablated)), selection.contexts, ()) if ablations else selection
    evaluated = {"full": evaluate(maker.make, judge, subjects, selection, setup, ("full", FULL))}
    for name in ablations:
        evaluated[name] = evaluate(maker.make, judge, subjects, few, setup, (name, ABLATIONS[name]))
    results = {
        "environment": where,
        "bundle": bundle_facts(runtime.bundle),
        "backend": choose(options.backend, runtime.bundle.manifest, Host()).backend,
        "scorers": {"digest": scorers.digest, **scorers.card},
        "settings": {**asdict(setup), "subjects": selection.count, "max_batch": options.max_batch},
        **summary({name: one.scores for name, one in evaluated.items()}),
    }
    path = write_results(options.out, results)
    shown = results_path(options.out).with_suffix(".html")
    with atomic_write(shown) as temporary:
        temporary.write_text(page(results, evaluated, subjects), encoding="utf-8")
    print_output(f"{path}\n{shown}\n{table(results)}")
    return 0


def _expanded(text: str) -> str:
    return ",".join(ABLATIONS) if text == _ALL else text


def summary(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the means of the full model, and what each ablation changes in the score that it should hurt."""
    full = scores["full"]
    ablations = {}
    for name, ablated in scores.items():
        if name == "full":
            continue
        about, hurt = ABLATIONS[name].about, ABLATIONS[name].hurts
        difference = paired_difference(full, ablated, hurt)
        if difference is None:
            continue
        score = float(ablated.of_subjects(hurt).mean())
        ablations[name] = {
            "about": about,
            "hurts": hurt,
            "full": round(score - difference["mean"], 4),
            "score": round(score, 4),
            "difference": difference,
            "scores": ablated.summary(),
        }
    return {
        "scores": full.summary(),
        "by_key": full.by_key(),
        "ablations": ablations,
        "pictures": {name: of.as_json() for name, of in scores.items()},
    }


def table(results: Mapping[str, Any]) -> str:
    """Return the scores and the ablations as Markdown tables."""
    lines = ["| score | mean | 95 % |", "|---|---|---|"]
    for name, found in results["scores"].items():
        low, high = found["interval"]
        lines.append(f"| {name} | {found['mean']:.3f} | {low:.3f} to {high:.3f} |")
    if results["ablations"]:
        lines += ["", "| ablation | score | full | ablated | difference | 95 % |", "|---|---|---|---|---|---|"]
    for of in results["ablations"].values():
        low, high = of["difference"]["interval"]
        numbers = f"{of['full']:.3f} | {of['score']:.3f} | {of['difference']['mean']:+.3f} | {low:+.3f} to {high:+.3f}"
        lines.append(f"| {of['about']} | {of['hurts']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
