"""Lines of the figure of numbers of tokens: which variants belong together."""

from dataclasses import replace

import pytest

from meteor.report.count_figures import count_figure, find_lines


@pytest.fixture
def make_answered(make_variant, make_score, make_run):
    """A variant of a study by its training, its model and its number of tokens when answering."""

    def make(name, model, k, score, *, answered=None, projector="meteor", lr=1.0, seed=0):
        settings = {
            "projector": {"name": projector, "settings": {"k": k, "window": 3}},
            "finetune": {"lr": lr, "seed": seed},
        }
        stages = {
            "finetune": replace(make_run("finetune", settings=settings), uri=model),
            "evaluate": make_run("evaluate", settings={"evaluate": {"k": answered, "sets": {}}}),
        }
        return make_variant(name, stages=stages, scores={"shapes": make_score(score)})

    return make


@pytest.fixture
def variants(make_answered):
    return [
        make_answered("k16", "a", 16, 0.6),
        make_answered("k4", "b", 4, 0.4, seed=1),
        make_answered("elastic", "c", [4, 8, 16], 0.58),
        make_answered("elastic_at_4", "c", [4, 8, 16], 0.41, answered=4),
        make_answered("k16_at_4", "a", 16, 0.2, answered=4),
        make_answered("other", "d", 8, 0.5, lr=2.0),
        make_answered("resampler", "e", 8, 0.5, projector="resampler"),
    ]


def test_answers_of_one_model_and_models_of_one_number_are_lines(variants):
    lines = {label: [(p.name, p.k) for p in points] for label, points in find_lines(variants, "shapes").items()}
    assert lines == {
        "one meteor model, trained with 16": [("k16_at_4", 4), ("k16", 16)],
        "one meteor model, trained with 4, 8, 16": [("elastic_at_4", 4), ("elastic", 16)],
        "a meteor model for each number of tokens": [("k4", 4), ("k16", 16)],
    }


def test_the_figure_says_its_numbers_and_needs_a_model_that_answered_twice(variants):
    figure = count_figure(variants)
    assert figure.png
    assert "one meteor model, trained with 4, 8, 16: 41.0 at 4, 58.0 at 16" in figure.alt
    assert count_figure([variant for variant in variants if "at_4" not in variant.name]) is None
    assert count_figure([replace(variant, scores=None) for variant in variants]) is None


def test_a_range_is_named_by_its_ends_and_equal_labels_are_numbered(make_answered):
    numbers = {"min": 4, "max": 64}
    variants = [make_answered(f"{model}{k}", model, numbers, 0.5, answered=k) for model in ("a", "b") for k in (4, 16)]
    assert list(find_lines(variants, "shapes")) == [
        "one meteor model, trained with 4 to 64",
        "one meteor model, trained with 4 to 64 (2)",
    ]
