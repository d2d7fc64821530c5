"""Paired differences against formulas by hand, and that clusters of questions about one image widen the interval."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from meteor.report.paired import paired_difference


def make_rows(scores, *, images=None, name="shapes"):
    images = images or [f"{i}.png" for i in range(len(scores))]
    return [
        {"set": name, "id": str(i), "question": "?", "image": image, "score": score, "quarantined": False}
        for i, (score, image) in enumerate(zip(scores, images, strict=True))
    ]


@pytest.fixture
def make_seed(make_variant):
    def make(scores, seed=0, **more):
        variant = make_variant(predictions=make_rows(scores, **more))
        return type(variant)(**{**vars(variant), "seed": seed})

    return make


def test_images_of_one_question_each_give_the_paired_t_interval(make_seed):
    mine, theirs = [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1]
    found = paired_difference([make_seed(mine)], [make_seed(theirs)], "shapes")
    differences = np.subtract(mine, theirs)
    error = differences.std(ddof=1) / math.sqrt(6)
    reach = student.ppf(0.975, 5) * error
    assert found.mean == pytest.approx(differences.mean())
    assert found.interval == pytest.approx((differences.mean() - reach, differences.mean() + reach))
    assert (found.num_questions, found.num_images) == (6, 6)


def test_questions_of_one_image_count_as_one_observation_where_they_agree(make_seed):
    """Each question asked four times of its image tells no more than asked once."""
    mine, theirs = [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1]
    once = paired_difference([make_seed(mine)], [make_seed(theirs)], "shapes")
    images = [f"{i}.png" for i in range(6) for _ in range(4)]
    often = paired_difference(
        [make_seed(np.repeat(mine, 4), images=images)],
        [make_seed(np.repeat(theirs, 4), images=images)],
        "shapes",
    )
    assert often.interval == pytest.approx(once.interval)
    assert (often.num_questions, often.num_images) == (24, 6)


def test_answers_without_a_score_of_their_own_are_left_out(make_seed):
    found = paired_difference([make_seed([1, None, 1])], [make_seed([0, None, 1])], "shapes")
    assert (found.num_questions, found.mean) == (2, 0.5)


def test_seeds_are_averaged_question_by_question_and_shown_one_by_one(make_seed):
    mine = [make_seed([1, 0, 1, 1], 0), make_seed([0, 0, 1, 1], 1)]
    theirs = [make_seed([0, 0, 1, 1], 0), make_seed([1, 0, 0, 1], 1)]
    found = paired_difference(mine, theirs, "shapes")
    assert found.by_seed == {0: 0.25, 1: 0.0}
    assert found.mean == 0.125
    assert not found.is_clear


def test_without_a_seed_in_common_means_are_compared(make_seed):
    found = paired_difference([make_seed([1, 1], 5)], [make_seed([0, 1], 0), make_seed([0, 0], 1)], "shapes")
    assert found.mean == 0.75
    assert list(found.by_seed) == [None]


def test_only_questions_that_both_were_asked_count(make_seed):
    found = paired_difference([make_seed([1, 1, 1])], [make_seed([0, 1])], "shapes")
    assert (found.num_questions, found.mean) == (2, 0.5)
    assert paired_difference([make_seed([1])], [make_seed([1], name="other")], "shapes") is None
    assert paired_difference([], [make_seed([1])], "shapes") is None


def test_one_image_gives_no_interval(make_seed):
    found = paired_difference([make_seed([1, 1], images=["a", "a"])], [make_seed([0, 1], images=["a", "a"])], "shapes")
    assert found.interval is None
    assert not found.is_clear


def test_a_difference_in_every_image_is_clear(make_seed):
    found = paired_difference([make_seed([1] * 9 + [0])], [make_seed([0] * 10)], "shapes")
    assert found.is_clear
