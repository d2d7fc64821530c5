"""From predictions to a set's table."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteor.data.samples import SampleProblem
from meteor.errors import DataError
from meteor.evaluation.metrics import CIRCULAR, EXACT_MATCH, POPE_F1, TRUE_FALSE, VQA_ACCURACY, judged, relaxed
from meteor.evaluation.questions import ask
from meteor.evaluation.score_table import score_rows, score_table, unusable_rows
from meteor.evaluation.scoring import pope_scores


def make_table(asked, metric=EXACT_MATCH):
    rows = score_rows("set", asked, metric)
    return rows, score_table(rows, [question for question, *_ in asked], metric)


def make_question(number, answer="yes", type="", image=None, **more):
    return ask(str(number), "what?", [image or f"{number}.png"], [answer], type=type, **more)


def test_all_questions_and_each_type_are_counted():
    asked = [
        (make_question(0, "two", "count"), "Two.", ""),
        (make_question(1, "two", "count"), "three", ""),
        (make_question(2, "four", "count"), "two", ""),
        (make_question(3, "red", "colour"), "red", ""),
        (make_question(4, "red"), "red", "truncated"),
    ]
    _, table = make_table(asked)
    assert (table["score"], table["num_questions"], table["num_quarantined"]) == (2 / 5, 5, 1)
    assert table["majority_score"] == 2 / 5
    assert table["interval"][0] < 2 / 5 < table["interval"][1]
    assert list(table["by_type"]) == ["colour", "count", "untyped"]
    count = table["by_type"]["count"]
    assert (count["score"], count["num_questions"], count["majority_score"]) == (1 / 3, 3, pytest.approx(2 / 3))
    # The right answer about a quarantined image is wrong.
    assert table["by_type"]["untyped"]["score"] == 0.0
    assert table["by_type"]["untyped"]["num_quarantined"] == 1
    assert json.loads(json.dumps(table)) == table


def test_an_empty_set_is_an_error():
    with pytest.raises(DataError, match="no predictions"):
        score_table([], [])


def test_questions_about_one_image_widen_the_interval():
    right = [1, 1, 0, 0, 1, 1, 0, 0]
    apart = [(make_question(i), "yes" if one else "no", "") for i, one in enumerate(right)]
    together = [(make_question(i, image=f"{i // 2}.png"), "yes" if one else "no", "") for i, one in enumerate(right)]
    width = [high - low for _, table in map(make_table, (apart, together)) for low, high in [table["interval"]]]
    assert width[1] > 1.2 * width[0]


def test_what_one_image_alone_was_asked_has_no_interval():
    _, table = make_table([(make_question(i, image="a.png"), "yes", "") for i in range(3)])
    assert (table["score"], table["interval"]) == (1.0, None)


def make_rotations(group, answers, options=("red", "blue")):
    """Prompts of one question, the right option being the first of ``options``."""
    asked = []
    for turn, prediction in enumerate(answers):
        turned = (*options[turn:], *options[:turn])
        question = make_question(
            f"{group}+{turn}", "ABCD"[(-turn) % len(options)], image=f"{group}.png", choices=turned, group=group
        )
        asked.append((question, prediction, ""))
    return asked


def test_a_circular_question_is_right_only_under_every_rotation():
    # The first is right both times, the second says A both times: right once, and so wrong.
    rows, table = make_table([*make_rotations("x", ["A", "B"]), *make_rotations("y", ["A", "A"])], CIRCULAR)
    assert [row["score"] for row in rows] == [1.0, None, 0.0, None]
    assert (table["score"], table["num_questions"]) == (0.5, 2)
    # Whatever letter is always given, it is wrong under some rotation.
    assert table["majority_score"] == 0.0


def test_a_question_with_more_options_weighs_no_more():
    four = make_rotations("x", ["A", "D", "C", "B"], options=("red", "blue", "green", "black"))
    rows, table = make_table([*four, *make_rotations("y", ["A", "A"])], CIRCULAR)
    assert table["score"] == 0.5
    scores = [row["score"] for row in rows if row["score"] is not None]
    assert sum(scores) / len(scores) == table["score"]


def test_chartqas_halves_weigh_the_same():
    asked = [(make_question(i, "5", "human"), "5", "") for i in range(6)]
    asked += [(make_question(9 + i, "5", "augmented"), "7", "") for i in range(2)]
    assert make_table(asked, relaxed(compat=True))[1]["score"] == 0.5


def make_pope(rows):
    return [
        (make_question(i, label, category), prediction, reason)
        for i, (category, prediction, label, reason) in enumerate(rows)
    ]


def test_pope_is_the_mean_of_its_categories_f1():
    rows = [
        ("random", "yes", "yes", ""),
        ("random", "no", "no", ""),
        ("popular", "yes", "no", ""),
        ("popular", "yes", "yes", ""),
    ]
    _, table = make_table(make_pope(rows), POPE_F1)
    # F1 is 1 in the first and 2/3 in the second; all four together would give 4/5.
    assert table["score"] == pytest.approx((1 + 2 / 3) / 2)
    assert table["by_type"]["popular"]["extra"] == pytest.approx(pope_scores(["yes", "yes"], ["no", "yes"]))
    assert table["extra"]["yes_ratio"] == 3 / 4
    assert table["extra"]["f1"] == pytest.approx(table["score"])


def test_a_quarantined_pope_question_is_wrong_whatever_its_label():
    rows = [("random", "", "yes", "truncated"), ("random", "", "no", "truncated"), ("random", "yes", "yes", "")]
    _, table = make_table(make_pope(rows), POPE_F1)
    assert table["score"] == pytest.approx(2 / 4)
    assert table["extra"]["accuracy"] == pytest.approx(1 / 3)


def test_statements_are_consistent_only_where_both_box_orders_are_right():
    asked = [
        (make_question(f"test-{scene}-0-{order}", "true"), prediction, "")
        for scene, predictions in enumerate([("true", "true"), ("true", "false"), ("false", "false")])
        for order, prediction in enumerate(predictions)
    ]
    asked.append((make_question("test-9-0-0", "true"), "true", ""))
    _, table = make_table(asked, TRUE_FALSE)
    assert table["score"] == 4 / 7
    # The statement with one image says nothing about consistency.
    assert table["extra"] == {"consistency": pytest.approx(1 / 3), "num_statements": 3}


def test_without_verdicts_or_answers_there_is_no_score():
    asked = [(make_question("v1_0", "a cat"), "a cat", "")]
    for table in (
        make_table(asked, judged(None))[1],
        make_table([(ask("1", "what?", ["a.png"]), "x", "")], VQA_ACCURACY)[1],
    ):
        assert (table["score"], table["interval"], table["majority_score"]) == (None, None, None)
        assert table["num_questions"] == 1
    # Nor does an image that cannot be used make one: 0 of the one question that is not waiting.
    asked_too = [*asked, (make_question("v1_1", "a dog"), "", "truncated")]
    assert make_table(asked_too, judged(None))[1]["score"] is None
    assert make_table(asked_too, judged({"v1_0": 0.4, "v1_1": 0.4}))[1]["score"] == 0.2
    assert make_table(asked, judged({"v1_0": 0.4}))[1]["score"] == 0.4
    with pytest.raises(DataError, match="'v1_0'"):
        make_table(asked, judged({}))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["random", "popular"]), st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])
        ),
        min_size=2,
        max_size=12,
    )
)
def test_influences_on_f1_add_up_to_nothing_and_asking_twice_changes_nothing(rows):
    scored = score_rows("s", make_pope([(*row, "") for row in rows]), POPE_F1)
    value, influences = POPE_F1.combine(scored)
    assert 0 <= value <= 1
    assert sum(influences) == pytest.approx(0, abs=1e-9)
    doubled, _ = POPE_F1.combine(scored * 2)
    assert doubled == pytest.approx(value)


def test_a_record_that_cannot_be_used_counts_as_a_wrong_question():
    rows, table = make_table(
        [(make_question("a"), "yes", ""), (make_question("b"), "yes", ""), (make_question("c"), "no", "")]
    )
    questions = [make_question(name) for name in "abc"]
    problems = [SampleProblem("d", "bad_question", "half of a pair")]
    more = score_table(rows, questions, num_unusable=1)
    unusable = unusable_rows("set", problems, is_scored=True)
    assert table["score"] == 2 / 3
    # The mean of the rows is the score, as for all other questions.
    assert more["score"] == sum(row["score"] for row in [*rows, *unusable]) / 4 == 2 / 4
    assert (more["num_questions"], more["num_quarantined"]) == (4, 1)
    assert more["majority_score"] == table["majority_score"] * 3 / 4
    assert unusable[0]["quarantine_reason"] == "bad_question: half of a pair"
    assert unusable[0].keys() == rows[0].keys()
    assert unusable_rows("set", problems, is_scored=False)[0]["score"] is None
