import math

import pytest

from meteor.train.schedule import learning_rate, native_weight


def test_the_rate_rises_for_two_steps_and_falls_along_a_cosine():
    # 10 steps, of which ceil(10 x 0.15) = 2 rise: 1/3, 2/3 of the peak; then eight steps over half a cosine.
    rates = [learning_rate(step, 10, peak=0.6, warmup_ratio=0.15) for step in range(10)]
    quarter = math.sqrt(0.5)
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[4] == pytest.approx(0.3 * (1 + quarter))
    assert rates[6] == pytest.approx(0.3)
    assert rates[8] == pytest.approx(0.3 * (1 - quarter))
    assert rates[9] == pytest.approx(0.3 * (1 + math.cos(math.pi * 7 / 8)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 33, 100, 2325])
@pytest.mark.parametrize("warmup_ratio", [0, 0.03, 0.5, 1])
def test_every_step_of_any_run_learns_and_none_above_the_peak(num_steps, warmup_ratio):
    rates = [learning_rate(step, num_steps, peak=1e-3, warmup_ratio=warmup_ratio) for step in range(num_steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, 50, peak=0.1, warmup_ratio=0) == 0.1


def test_the_native_weight_rises_linearly_over_its_share_of_the_steps():
    # 10 steps, of which round(10 x 0.4) = 4 rise from 0 to 1 - lambda = 0.2.
    weights = [native_weight(step, 10, full=0.2, warmup=0.4) for step in range(10)]
    assert weights == pytest.approx([0, 0.05, 0.1, 0.15, *[0.2] * 6])


def test_without_warm_up_the_native_weight_is_full_at_once():
    assert [native_weight(step, 3, full=0.2, warmup=0) for step in range(3)] == [0.2] * 3


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 2325])
@pytest.mark.parametrize("warmup", [0, 0.3, 0.9])
def test_after_its_warm_up_the_native_weight_is_full_to_the_end(num_steps, warmup):
    weights = [native_weight(step, num_steps, full=0.2, warmup=warmup) for step in range(num_steps)]
    num_rising = round(num_steps * warmup)
    assert weights == sorted(weights)
    assert all(0 <= weight < 0.2 for weight in weights[:num_rising])
    assert set(weights[num_rising:]) <= {0.2}


def test_a_warm_up_of_the_whole_stage_ends_one_step_short_of_the_full_weight():
    weights = [native_weight(step, 4, full=0.2, warmup=1) for step in range(4)]
    assert weights == pytest.approx([0, 0.05, 0.1, 0.15])
