"""Metrics against cases worked by hand, one test a trap, and what must hold for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteor.evaluation.scoring import (
    anls,
    exact_match,
    normalise_answer,
    pope_scores,
    read_true_false,
    read_yes_no,
    relaxed_accuracy,
    vqa_accuracy,
)
from meteor.evaluation.vqa_accuracy import normalise_vqa

TEXTS = st.text(max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("  a \t red\n CAR . ", "a red car"), ("3.5", "3.5"), ("wait...", "wait"), (".", ""), ("", "")],
)
def test_an_answer_is_normalised_as_gqa_does(text, expected):
    assert normalise_answer(text) == expected


def test_exact_match_compares_normalised_answers():
    assert exact_match(" True.", "true") == 1.0
    assert exact_match("not true", "true") == 0.0


# VQA accuracy


@pytest.mark.parametrize(
    ("num_equal", "expected"),
    # Of n equal answers among ten, n annotators see n - 1 others and 10 - n see n: n = 3 is (3 * 2/3 + 7 * 1) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(num_equal, expected):
    answers = ["cat"] * num_equal + [f"other {i}" for i in range(10 - num_equal)]
    assert vqa_accuracy("cat", answers) == pytest.approx(expected)


def test_vqa_normalises_only_where_annotators_differ():
    assert vqa_accuracy("Two", ["2"] * 9 + ["two"]) == 1.0
    assert vqa_accuracy("Two", ["2"] * 10) == 0.0
    assert vqa_accuracy(" 2\n", ["2"] * 10) == 1.0  # line breaks and the ends are cleaned in any case


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red, big car!", "red big car"),
        ("1,000", "1000"),
        ("1,000 a/b", "1000 ab"),  # a comma between digits removes every mark ...
        ("a/b", "b"),  # ... which is a space elsewhere, and then "a" is an article
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),  # beside a space it goes without leaving another
        ("blue-green", "blue green"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("its", "its"),  # not in the official table
        ("what?", "what"),
    ],
)
def test_vqa_normalisation_is_the_official_one(text, expected):
    assert normalise_vqa(text) == expected


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=10), st.randoms())
def test_vqa_accuracy_is_a_share_and_does_not_depend_on_the_annotators_order(prediction, answers, random):
    score = vqa_accuracy(prediction, answers)
    shuffled = list(answers)
    random.shuffle(shuffled)
    assert 0 <= score <= 1
    assert vqa_accuracy(prediction, shuffled) == pytest.approx(score)


def test_vqa_accuracy_refuses_a_question_without_answers():
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy("cat", [])


# ANLS


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Hello", ["hello"], 1.0),
        ("hello world", ["hello  world"], 1.0),
        # One substitution of five.
        ("hallo", ["hello"], 0.8),
        # 2 of 4 is at the threshold, 3 of 5 below it.
        ("abxx", ["abcd"], 0.5),
        ("abxxx", ["abcde"], 0.0),
        ("b", ["abc", "b"], 1.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        # The length is that of the texts as they are: one edit of the longer text's six characters.
        ("a   cd", ["a ce"], 1 - 1 / 6),
    ],
)
def test_anls_worked_by_hand(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)


def test_the_threshold_of_anls_can_be_another():
    assert anls("abxxx", ["abcde"], threshold=0.3) == pytest.approx(0.4)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_anls_is_a_share_and_symmetric_in_its_references(prediction, answers):
    score = anls(prediction, answers)
    assert 0 <= score <= 1
    assert anls(prediction, answers[::-1]) == score
    assert anls(prediction, [*answers, prediction]) == 1.0


@given(TEXTS, TEXTS)
def test_edits_are_counted_as_a_slow_definition_does(one, other):
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    one, other = (" ".join(text.lower().split())[:5].strip() for text in (one, other))
    length = max(len(one), len(other))
    expected = 1.0 if not length else 1 - slow(one.lower(), other.lower()) / length
    assert anls(one, [other], threshold=0) == pytest.approx(max(expected, 0.0))


# Relaxed accuracy


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-95", "-100", 1.0),
        ("50%", "0.5", 1.0),
        ("0.5", "50%", 1.0),
        ("50", "50%", 0.0),
        ("Yes", "yes", 1.0),
        ("1,000", "1000", 0.0),  # the reference code knows no thousands separators
        ("14 ", "14", 1.0),
        ("nan", "NaN", 1.0),
        ("inf", "5", 0.0),
        ("five", "5", 0.0),
    ],
)
def test_relaxed_accuracy_worked_by_hand(prediction, target, expected):
    assert relaxed_accuracy(prediction, target) == expected


def test_a_target_of_zero_is_a_text_unless_repaired():
    assert relaxed_accuracy("0.0", "0") == 0.0
    assert relaxed_accuracy("0", "0") == 1.0
    assert relaxed_accuracy("0.0", "0", compat=False) == 1.0
    assert relaxed_accuracy("0.01", "0", compat=False) == 0.0


@given(TEXTS, TEXTS)
def test_relaxed_accuracy_takes_any_text(prediction, target):
    assert relaxed_accuracy(prediction, target) in (0.0, 1.0)
    assert relaxed_accuracy(target, target) == 1.0


# POPE, and statements


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a cat", "no"),
        ("Yes. There is no dog.", "yes"),  # the first sentence counts
        ("I know", "yes"),  # "no" is a word, not a part of one
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(text, expected):
    assert read_yes_no(text) == expected


def test_popes_five_numbers_worked_by_hand():
    predictions = ["yes", "Yes.", "no", "no", "yes"]
    labels = ["yes", "no", "no", "yes", "yes"]
    found = pope_scores(predictions, labels)
    # Hits 2, false alarms 1, misses 1, right rejections 1.
    expected = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    assert found == pytest.approx(expected)


def test_the_yes_ratio_is_of_predictions_not_of_labels():
    assert pope_scores(["yes", "yes"], ["no", "yes"])["yes_ratio"] == 1.0


def test_never_saying_yes_divides_by_nothing():
    found = pope_scores(["no", "no"], ["yes", "no"])
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (0, 0, 0, 0.5)


@pytest.mark.parametrize(("predictions", "labels"), [([], []), (["yes"], []), (["yes"], ["maybe"])])
def test_pope_refuses_what_it_cannot_score(predictions, labels):
    with pytest.raises(ValueError):
        pope_scores(predictions, labels)


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["yes", "no"])), min_size=1, max_size=8), st.randoms())
def test_popes_numbers_are_shares_of_a_set(rows, random):
    found = pope_scores([text for text, _ in rows], [label for _, label in rows])
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert all(0 <= value <= 1 for value in found.values())
    assert pope_scores([text for text, _ in shuffled], [label for _, label in shuffled]) == pytest.approx(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("True.", "true"), ("true, it is", "true"), ("No", "false"), ("yes", "true"), ("truely", "truely"), ("", "")],
)
def test_a_statement_is_true_or_false_by_the_first_word(text, expected):
    assert read_true_false(text) == expected
