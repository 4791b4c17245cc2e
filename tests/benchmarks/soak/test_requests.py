"""The soak test's requests: a pool of distinct ones, and a reproducible sequence drawn from it."""

import dataclasses

import numpy as np
import pytest

from benchmarks.soak.requests import (
    MISTAKES,
    SCHEDULES,
    SUBJECTS,
    Kind,
    PictureRequest,
    draw_requests,
    photo_and_mask,
    pool,
)


@pytest.mark.parametrize("has_language_model", [True, False])
def test_no_picture_belongs_to_two_requests(has_language_model):
    found = pool(200, has_language_model, seed=3)
    pictures = [picture for request in found for picture in request.single()]
    assert len(found) == 200
    assert len(set(pictures)) == len(pictures) > 250
    assert {r.schedule for r in found} == set(SCHEDULES)
    assert {r.subject for r in found} == set(SUBJECTS)
    assert pool(200, has_language_model, seed=3) == found


@pytest.mark.parametrize("has_language_model", [True, False])
def test_some_requests_differ_in_a_single_argument(has_language_model):
    found = pool(48, has_language_model, seed=0)
    first = next(r for r in found if r.schedule == SCHEDULES[0])
    alone = {
        names[0]
        for other in found
        if len(names := [f.name for f in dataclasses.fields(first) if getattr(first, f.name) != getattr(other, f.name)])
        == 1
    }
    # Without a language model the embedding follows from the prompt, so the two differ together.
    assert alone >= {"schedule", "subject", "seed", "strength", "negative_prompt", "embedding"}
    assert ("prompt" in alone) == has_language_model
    assert any(r.num_images == 2 for r in found)


def test_embeddings_replace_the_language_model():
    assert all(r.options(8)["context_embedding"] is not None for r in pool(48, False, seed=0))
    kinds = {r.embedding is None for r in pool(48, True, seed=0)}
    assert kinds == {True, False}
    given = PictureRequest(SCHEDULES[0], embedding=5).options(8)["context_embedding"]
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, PictureRequest(SCHEDULES[1], embedding=5).options(8)["context_embedding"])


def test_a_request_for_two_pictures_splits_into_two():
    request = PictureRequest(SCHEDULES[0], seed=1000, num_images=2)
    assert [(r.seed, r.num_images) for r in request.single()] == [(1000, 1), (1001, 1)]


def test_a_thousand_drawn_requests_cover_everything():
    drawn = draw_requests(1000, 48, seed=0)
    assert drawn == draw_requests(1000, 48, seed=0)
    assert drawn != draw_requests(1000, 48, seed=1)
    assert {d.kind for d in drawn} == set(Kind)
    assert {d.chosen for d in drawn} == set(range(48))
    assert {d.mistake for d in drawn if d.kind is Kind.REFUSED} == set(range(len(MISTAKES)))
    assert 0.85 < sum(d.kind is Kind.PICTURE for d in drawn) / 1000 < 0.95


def test_subjects_have_masks_of_different_sizes():
    covered = []
    for name in SUBJECTS:
        photo, mask = photo_and_mask(name)
        assert photo.size == mask.size
        covered.append(float((np.asarray(mask) > 0).mean()))
    assert covered[0] == pytest.approx(covered[1])
    assert covered[2] == 1.0
    assert 0 < covered[3] < covered[0]
