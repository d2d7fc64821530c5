"""Reading the option that an answer names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteor.evaluation.choices import list_options, mmmu_open_score, read_letter, read_mmmu_choice

COLOURS = ["red", "blue", "green"]


def test_options_are_listed_a_line_each():
    assert list_options(["red", "blue"]) == "A. red\nB. blue"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B) blue", "B"),
        ("B: blue", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("The answer is B", "B"),
        ("The answer is (C), not B", "C"),
        ("A man", ""),  # the article
        ("A or B", "B"),
        ("D", ""),  # there is no fourth option
        ("B and C", ""),
        ("Because", ""),
        ("", ""),
    ],
)
def test_a_letter_is_read_where_one_is_named(text, expected):
    assert read_letter(text, COLOURS) == expected


def test_an_options_own_text_counts_where_it_is_one_options_alone():
    assert read_letter("A dog", ["a cat", "a dog"]) == "B"
    assert read_letter("same", ["same", "same"]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(A) or (B)", "B"),  # of several, the one that begins last
        ("B.", "B"),
        ("It must be one of them, I think red is right", "A"),
        ("It may be red but in the end blue", "B"),
    ],
)
def test_mmmu_reads_choices_in_its_own_way(text, expected):
    assert read_mmmu_choice(text, COLOURS, seed="q1") == expected


def test_what_cannot_be_read_is_drawn_by_the_question_alone():
    drawn = [read_mmmu_choice("?", COLOURS, seed=f"q{i}") for i in range(30)]
    assert drawn == [read_mmmu_choice("?", COLOURS, seed=f"q{i}") for i in range(30)]
    assert set(drawn) == {"A", "B", "C"}
    # "A." is not " A ", and two words are too few to look for an option's text.
    assert [read_mmmu_choice("A. red", COLOURS, seed=f"q{i}") for i in range(30)] == drawn


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The answer is 3.14159", ["3.14"], 1.0),  # rounded to two decimals
        ("1,234", ["1234"], 1.0),
        ("x = 5", ["5"], 1.0),
        ("x = 5", ["6"], 0.0),
        ("it is the mitochondria", ["mitochondria"], 1.0),
        ("it is a banana", ["n"], 0.0),  # one letter must stand beside a space
        ("so it is 24/7", ["24/7", "3.429"], 1.0),
        ("", ["5"], 0.0),
    ],
)
def test_open_answers_of_mmmu(text, answers, expected):
    assert mmmu_open_score(text, answers) == expected


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_any_text_is_read(text, options):
    letters = "ABCDE"[: len(options)]
    assert read_letter(text, options) in ("", *letters)
    assert read_mmmu_choice(text, options, seed="x") in letters
    assert mmmu_open_score(text, options) in (0.0, 1.0)
