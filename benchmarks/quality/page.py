"""The HTML page of an evaluation: one file with the scores and all pictures."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.quality.cases import CONTEXT, KEYS
from benchmarks.quality.evaluation import Evaluated
from benchmarks.quality.scores import SCORES
from benchmarks.quality.subjects import photo_of
from examples.mini_moma.icons import Icon

_SIDE, _QUALITY = 96, 80
# Of each ablation, pictures of so many subjects are shown.
_ABLATED_ROWS = 4
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 2px 6px; text-align: left; font-weight: normal; white-space: nowrap; }
thead th { font-weight: 600; }
.pictures td, .pictures th { padding: 1px; font-size: 11px; text-align: center; }
img { display: block; width: 96px; height: 96px; border: 2px solid #3a3; }
img.wrong { border-color: #d33; }
img.photo { border-color: #fff; }
"""


def page(results: Mapping[str, Any], evaluated: Mapping[str, Evaluated], subjects: Sequence[Icon]) -> str:
    """Return the page.

    Args:
        results: what is written as JSON.
        evaluated: the full model's pictures, then those of each ablation, by name.
    """
    bundle, settings = results["bundle"], results["settings"]
    facts = (
        f"{bundle['base']}, {bundle['precision']}, {bundle['image_size']} pixels; backend {results['backend']}; "
        + (", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None))
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quality</title><style>{_STYLE}</style>",
        f"<h1>Quality of a bundle's pictures</h1><p>{html.escape(facts)}</p>",
        _score_table(results["scores"]),
        _ablation_table(results["ablations"]),
        _key_table(results["by_key"]),
        "<p>The frame is green where the context or material is recognized as the one that was asked for, red where it "
        "is not; below are what was recognized and the rank of the own photo among 50.</p>",
    ]
    for name, one in evaluated.items():
        rows = len(one.pictures) if name == "full" else min(_ABLATED_ROWS, len(one.pictures))
        about = "" if name == "full" else f": {results['ablations'][name]['about']}"
        parts.append(f"<h2>{html.escape(name.replace('_', ' ') + about)}</h2>")
        parts.append("".join(_picture_table(one, subjects, rows)))
    return "\n".join(parts) + "</html>\n"


def _score_table(scores: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td>{_number(found)}</td><td>{SCORES[name].about}</td></tr>"
        for name, found in scores.items()
    )
    return f"<table><thead><tr><th>score</th><th>mean [95 %]</th><th></th></tr></thead>{rows}</table>"


def _ablation_table(ablations: Mapping[str, Any]) -> str:
    if not ablations:
        return ""
    rows = "".join(
        f"<tr><th>{html.escape(of['about'])}</th><td>{of['hurts']}</td><td>{of['full']:.3f}</td>"
        f"<td>{of['score']:.3f}</td><td>{_number(of['difference'])}</td></tr>"
        for of in ablations.values()
    )
    head = "<tr><th>ablation</th><th>score</th><th>full</th><th>ablated</th><th>difference [95 %]</th></tr>"
    return f"<table><thead>{head}</thead>{rows}</table>"


def _key_table(by_key: Mapping[str, Mapping[str, float]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in SCORES)
    rows = []
    for key, scores in by_key.items():
        cells = "".join(f"<td>{scores[name]:.3f}</td>" if name in scores else "<td></td>" for name in SCORES)
        rows.append(f"<tr><th>{key}</th>{cells}</tr>")
    return f"<table><thead><tr><th></th>{heads}</tr></thead>{''.join(rows)}</table>"


def _number(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _picture_table(evaluated: Evaluated, subjects: Sequence[Icon], rows: int) -> Iterator[str]:
    scores = evaluated.scores
    heads = "".join(f"<th>{key}</th>" for key in scores.keys)
    yield f"<table class=pictures><thead><tr><th>subject</th><th>photo</th>{heads}</tr></thead>"
    for row in range(rows):
        photo = _image(photo_of(subjects, row).picture_hwc, "photo")
        yield f"<tr><th>{html.escape(scores.subjects[row])}</th><td>{photo}</td>"
        for column, key in enumerate(scores.keys):
            shown = scores.found[key][row]
            caption = shown
            if key in KEYS[CONTEXT]:
                caption = f"{shown}, {scores.values['rank'][row, column]:.0f}"
            kind = "right" if shown == key else "wrong"
            yield f"<td>{_image(evaluated.pictures[row][column], kind)}{caption}</td>"
        yield "</tr>"
    yield "</table>"


def _image(picture_hwc: npt.NDArray[np.uint8], kind: str) -> str:
    image = Image.fromarray(picture_hwc).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class={kind} loading=lazy alt="" src="data:image/jpeg;base64,{data}">'
