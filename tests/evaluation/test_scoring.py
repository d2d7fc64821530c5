"""Metrics against cases worked by hand."""

import json

import pytest

from meteor.errors import DataError
from meteor.evaluation.scoring import exact_match, normalise_answer, score_row, score_table, wilson_interval


def make_row(prediction="yes", answer="yes", type="", quarantined=False):
    return {"prediction": prediction, "answer": answer, "type": type, "quarantined": quarantined}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  a \t red\n CAR . ", "a red car"),
        ("3.5", "3.5"),
        ("wait...", "wait"),
        (".", ""),
        ("", ""),
    ],
)
def test_an_answer_is_normalised_as_gqa_does(text, expected):
    assert normalise_answer(text) == expected


def test_exact_match_compares_normalised_answers():
    assert exact_match(" True.", "true") == 1.0
    assert exact_match("not true", "true") == 0.0


def test_a_right_answer_about_a_quarantined_picture_scores_nothing():
    assert score_row(make_row()) == 1.0
    assert score_row(make_row(quarantined=True)) == 0.0


def test_the_wilson_interval_is_the_one_worked_by_hand():
    # 1 of 4 with z = 1.96: centre (0.25 + 3.8416/8) / (1 + 3.8416/4) = 0.3725, half width 0.3269.
    assert wilson_interval(1, 4) == pytest.approx((0.0456, 0.6994), abs=2e-4)


@pytest.mark.parametrize(("num_right", "num_questions"), [(0, 1), (1, 1), (0, 7), (7, 7), (500, 1000)])
def test_the_wilson_interval_solves_its_defining_equation(num_right, num_questions):
    # Its ends are where the score test is at its limit: |share - end| = z * sqrt(end * (1 - end) / n).
    share = num_right / num_questions
    for end in wilson_interval(num_right, num_questions):
        assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / num_questions) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("num_right", "num_questions"), [(0, 0), (2, 1), (-1, 3)])
def test_the_wilson_interval_refuses_what_is_not_a_share(num_right, num_questions):
    with pytest.raises(ValueError, match=f"{num_right} right of {num_questions}"):
        wilson_interval(num_right, num_questions)


def test_the_table_counts_all_questions_and_each_type():
    rows = [
        make_row("Two.", "two", "count"),
        make_row("three", "two", "count"),
        make_row("two", "four", "count"),
        make_row("red", "red", "colour"),
        make_row("red", "red", quarantined=True),
    ]

    table = score_table(rows)

    assert (table["exact_match"], table["num_questions"], table["num_quarantined"]) == (2 / 5, 5, 1)
    assert table["majority_share"] == 2 / 5
    assert table["interval"] == list(wilson_interval(2, 5))
    assert list(table["by_type"]) == ["colour", "count", "untyped"]
    count = table["by_type"]["count"]
    assert (count["exact_match"], count["num_questions"], count["majority_share"]) == (1 / 3, 3, 2 / 3)
    assert table["by_type"]["untyped"]["exact_match"] == 0.0
    assert table["by_type"]["untyped"]["num_quarantined"] == 1


def test_the_table_survives_json():
    table = score_table([make_row()])
    assert json.loads(json.dumps(table)) == table


def test_an_empty_benchmark_is_an_error():
    with pytest.raises(DataError, match="no predictions"):
        score_table([])
