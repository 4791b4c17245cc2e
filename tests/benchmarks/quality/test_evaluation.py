"""The judge recognizes renders, and tells what is wrong with others; the page shows them."""

import numpy as np
import pytest

from benchmarks.quality.cases import FULL, KEYS, Setup, cases
from benchmarks.quality.command import summary, table
from benchmarks.quality.evaluation import Selection, evaluate
from benchmarks.quality.generation import Made
from benchmarks.quality.page import page
from moma_rt.errors import InputError

SELECTION = Selection(6)


@pytest.fixture(scope="module")
def perfect(judge, subjects, rendered):
    return evaluate(rendered, judge, subjects, SELECTION, Setup(), ("full", FULL))


def test_renders_score_nearly_one(perfect):
    means = {name: found["mean"] for name, found in perfect.scores.summary().items()}
    assert means["prompt"] > 0.95
    assert means["texture"] > 0.9
    assert means["subject"] > 0.9
    assert means["rank"] < 1.5
    assert means["foreground"] > 0.8
    assert means["foreground_at_0.2"] > 0.8


def test_each_score_sees_its_own_fault(judge, subjects, rendered, perfect):
    def other_subject(asked, setup, ablation):
        return rendered(cases((asked[0].subject + 1) % 50, "x", KEYS["context"], KEYS["texture"]), setup, ablation)

    def other_context(asked, setup, ablation):
        made = rendered(asked, setup, ablation)
        return [*made[1:12], made[0], *made[13:], made[12]]

    def other_foreground(asked, setup, ablation):
        made = rendered(asked, setup, ablation)
        return [Made(one.picture_hwc, np.roll(one.foreground_gg, 8, axis=1)) for one in made]

    def means(make):
        scores = evaluate(make, judge, subjects, SELECTION, Setup(), ("changed", FULL)).scores
        return {name: found["mean"] for name, found in scores.summary().items()}

    full = {name: found["mean"] for name, found in perfect.scores.summary().items()}
    found = means(other_subject)
    assert found["subject"] < 0.1
    assert found["similarity"] < full["similarity"] - 0.3
    assert found["prompt"] > 0.95
    found = means(other_context)
    assert found["prompt"] < 0.05
    assert found["texture"] < 0.1
    assert found["subject"] > 0.9
    found = means(other_foreground)
    assert found["foreground"] < 0.4
    assert found["subject"] == full["subject"]


def test_pictures_of_other_sizes_are_judged_at_128(judge, subjects, rendered, perfect):
    def doubled(asked, setup, ablation):
        made = rendered(asked, setup, ablation)
        return [
            Made(one.picture_hwc.repeat(2, 0).repeat(2, 1), one.foreground_gg.repeat(2, 0).repeat(2, 1)) for one in made
        ]

    selection = Selection(2, ("beach", "city"), ())
    found = evaluate(doubled, judge, subjects, selection, Setup(), ("full", FULL))
    assert found.pictures[0][0].shape == (128, 128, 3)
    assert found.scores.summary()["prompt"]["mean"] == 1.0
    np.testing.assert_allclose(
        found.scores.values["similarity"], perfect.scores.values["similarity"][:2, [0, 8]], atol=1e-5
    )


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="neither a context nor a texture is left"):
        Selection(1, (), ())


def test_the_page_holds_scores_and_all_pictures_and_few_of_an_ablation(judge, subjects, rendered, perfect):
    ablated = evaluate(rendered, judge, subjects, Selection(6, ("beach",), ()), Setup(), ("empty_prompt", FULL))
    evaluated = {"full": perfect, "empty_prompt": ablated}
    results = {
        "bundle": {"base": "<mini>", "precision": "fp32", "image_size": 128},
        "backend": "onnxruntime",
        "settings": {"steps": 20},
        **summary({name: one.scores for name, one in evaluated.items()}),
    }
    text = page(results, evaluated, subjects)
    assert text.count("<img ") == 6 * 17 + 4 * 2
    assert "&lt;mini&gt;, fp32" in text
    assert "http" not in text, "it loads nothing"
    assert len(text) < 1e6
    assert results["ablations"]["empty_prompt"]["difference"]["mean"] == 0
    lines = table(results).splitlines()
    assert lines[2].startswith("| prompt | 1.000" if perfect.scores.summary()["prompt"]["mean"] == 1 else "| prompt |")
    assert lines[-1].startswith("| an empty prompt | prompt | ")
