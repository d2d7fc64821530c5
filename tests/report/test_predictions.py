"""Which answers are shown."""

from meteor.report import choose_predictions


def test_right_mixed_and_wrong_questions_are_all_shown(make_variant, make_prediction):
    first = [make_prediction(f"q{i}", score=float(i < 60)) for i in range(90)]
    second = [make_prediction(f"q{i}", score=float(i < 30)) for i in range(90)]

    rows = choose_predictions([make_variant("a", predictions=first), make_variant("b", predictions=second)], num_rows=6)

    scores = [tuple(score for _, score in row.answers.values()) for row in rows]
    assert scores == [(1.0, 1.0), (1.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)]


def test_a_group_that_is_short_leaves_its_place_to_the_others(make_variant, make_prediction):
    predictions = [make_prediction(f"q{i}", score=float(i > 0)) for i in range(20)]
    rows = choose_predictions([make_variant(predictions=predictions)], num_rows=5)
    assert [row.answers["meteor"][1] for row in rows] == [1.0] * 4 + [0.0]


def test_fewer_questions_than_rows_are_all_shown(make_variant, make_prediction):
    assert len(choose_predictions([make_variant(predictions=[make_prediction()])], num_rows=9)) == 1
    assert choose_predictions([make_variant()]) == []


def test_one_id_with_two_questions_is_two_rows(make_variant, make_prediction):
    predictions = [
        make_prediction(question="Is it?"),
        make_prediction(question="Are they?", prediction="no", score=0.0),
    ]
    rows = choose_predictions([make_variant(predictions=predictions)])
    assert {row.question: row.answers["meteor"] for row in rows} == {"Is it?": ("yes", 1.0), "Are they?": ("no", 0.0)}


def test_questions_about_a_quarantined_image_are_left_out(make_variant, make_prediction):
    predictions = [make_prediction("q1"), make_prediction("q2", score=0.0, quarantined=True)]
    assert len(choose_predictions([make_variant(predictions=predictions)])) == 1
