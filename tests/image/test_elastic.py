"""Numbers of visual tokens from which training draws: their forms, their frequencies, and the numbers for answering."""

import math
from collections import Counter

import pytest

from meteor.data.order import draw_count
from meteor.errors import SettingsError
from meteor.image.budget import visual_token_budget
from meteor.image.elastic import COUNT_SETTINGS, TokenCounts, token_counts, with_count

GRIDS = [(8, 8), (2, 3)]
DRAWN = [4, 64, 16, 64, 64, 64, 16, 16, 4, 64, 4, 64]
SET, RANGE = [4, 16, 64], {"min": 4, "max": 64}


@pytest.mark.parametrize("name", COUNT_SETTINGS)
def test_plans_use_the_largest_number_and_answers_any_other(name):
    setting, _ = COUNT_SETTINGS[name]
    values = [2, 4, 8] if setting == "grid" else SET
    settings = {setting: values}
    assert token_counts(name, settings).values == (4, 16, 64)
    single = {setting: values[-1]}
    assert visual_token_budget(name, settings)(GRIDS) == visual_token_budget(name, single)(GRIDS)
    for value, k in zip(values, (4, 16, 64), strict=True):
        alone = visual_token_budget(name, {setting: value})(GRIDS)
        assert visual_token_budget(name, settings, k=k)(GRIDS) == alone
        assert with_count(name, settings, k) == {setting: value}


def test_draws_are_arithmetic_of_seed_and_step():
    counts = TokenCounts.read("k", SET)
    # Written down, so that another machine or version that drew otherwise would fail.
    assert [draw_count(counts, seed=0, step=step) for step in range(12)] == DRAWN
    assert [draw_count(counts, seed=1, step=step) for step in range(12)] != DRAWN


def test_numbers_of_a_list_are_equally_frequent():
    drawn = Counter(draw_count(TokenCounts.read("k", SET), seed=3, step=step) for step in range(3000))
    assert drawn.keys() == set(SET)
    assert all(900 < count < 1100 for count in drawn.values())


def test_each_octave_of_a_range_is_equally_frequent():
    counts = TokenCounts.read("k", RANGE)
    assert counts.values == tuple(range(4, 65))
    shares = {n: weight / sum(counts.weights) for n, weight in zip(counts.values, counts.weights, strict=True)}
    assert shares[8] / shares[32] == pytest.approx(4)
    drawn = Counter(math.floor(math.log2(draw_count(counts, seed=0, step=step))) for step in range(4000))
    # 64 alone is the first number of the next octave. Sums of 1 / n fall short of ln 2 by less where n is large.
    for octave in (2, 3, 4, 5):
        expected = 4000 * sum(shares[n] for n in range(2**octave, 2 ** (octave + 1)))
        assert drawn[octave] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([16, 4], "ascending order"),
        ([4, 4], "each once"),
        ([4], "at least two"),
        ([], "at least two"),
        ([0, 4], "whole numbers above 0"),
        ([True, 4], "whole numbers above 0"),
        (4.5, "whole numbers above 0"),
        ({"min": 4}, "min: 16, max: 144"),
        ({"min": 8, "max": 8}, "min below max"),
        ({"min": 8, "max": 9, "step": 1}, "min: 16, max: 144"),
    ],
)
def test_other_forms_are_refused(value, message):
    for name in ("meteor", "visual_topk"):
        with pytest.raises(SettingsError, match=message):
            visual_token_budget(name, {"k": value})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"k": SET}),
        ("c_abstractor", {"grid": [4, 8]}),
        ("ldpv2", {"grid": {"min": 2, "max": 4}}),
        ("tokenpacker", {"scale_factor": [2, 4]}),
        ("visionzip", {"dominant": [4, 8]}),
        ("prumerge_plus", {"max_tokens": [4, 8]}),
    ],
)
def test_projectors_for_a_single_number_refuse_several(name, settings):
    with pytest.raises(
        SettingsError, match=f"'{name}' is trained with a single number of tokens.*choose one of: meteor"
    ):
        visual_token_budget(name, settings)


def test_a_resampler_takes_a_list_and_no_range():
    with pytest.raises(SettingsError, match=r"prime numbers.*list the numbers"):
        visual_token_budget("resampler", {"k": RANGE})


@pytest.mark.parametrize(
    ("name", "settings", "k", "message"),
    [
        ("mlp", {}, 3, "k=3: projector 'mlp' has no k that may be chosen"),
        ("meteor", {}, 0, "whole number of tokens above 0"),
        ("avg_pool", {"grid": 8}, 50, "k=50: .* square number"),
        ("resampler", {"k": SET}, 9, "trained for 4, 16, 64 tokens per sub-image"),
        ("llava_mini", {}, 4, "trained for 1 tokens"),
    ],
)
def test_a_number_that_the_projector_cannot_make_is_refused(name, settings, k, message):
    with pytest.raises(SettingsError, match=message):
        visual_token_budget(name, settings, k=k)
