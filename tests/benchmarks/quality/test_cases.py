"""Prompts and seeds of the evaluation."""

from benchmarks.quality.cases import ABLATIONS, CONTEXT, KEYS, TEXTURE, Setup, cases
from benchmarks.quality.scores import SCORES
from benchmarks.quality.subjects import COUNT


def test_prompts_change_their_phrases_and_every_seed_is_used_once():
    all_cases = [case for i in range(COUNT) for case in cases(i, "owl", KEYS[CONTEXT], KEYS[TEXTURE])]
    assert len({case.seed for case in all_cases}) == len(all_cases) == COUNT * 16
    beaches = {case.prompt for case in all_cases if case.key == "beach"}
    assert beaches == {"An owl on a beach.", "An owl on the beach.", "An owl at the seaside."}
    assert {case.prompt for case in all_cases if case.key == "gold"} == {
        "An owl made of gold.",
        "An owl in gold.",
        "A golden owl.",
    }
    assert all_cases[0].prompt_for("teapot") == "A teapot on a beach."


def test_a_case_does_not_depend_on_which_others_are_asked_for():
    (alone,) = cases(3, "owl", ("night",), ())
    assert alone in cases(3, "owl", KEYS[CONTEXT], KEYS[TEXTURE])


def test_textures_have_a_strength_of_their_own():
    context, texture = cases(0, "owl", ("night",), ("ice",))
    assert (Setup().strength_of(context), Setup().strength_of(texture)) == (1.0, 0.4)


def test_ablations_hurt_scores_that_exist():
    assert {ablation.hurts for ablation in ABLATIONS.values()} <= SCORES.keys()
