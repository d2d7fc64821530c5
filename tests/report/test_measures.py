"""Derived numbers against slow or hand-worked truth."""

import numpy as np
import pytest

from meteor.report.measures import column, final_loss, median_rate, smooth, total, training_seconds


def slow_smooth(values):
    half_window = len(values) // 40
    windows = [values[max(i - half_window, 0) : i + half_window + 1] for i in range(len(values))]
    return [np.mean([value for value in window if np.isfinite(value)]) for window in windows]


def test_smoothing_is_the_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=200)
    values[17] = np.nan
    np.testing.assert_allclose(smooth(values), slow_smooth(values), atol=1e-12)


def test_smoothing_does_not_lag_behind_a_slope():
    values = np.arange(400, dtype=np.float64)
    np.testing.assert_allclose(smooth(values)[20:-20], values[20:-20])


def test_a_stretch_without_any_loss_stays_a_gap():
    values = np.ones(100)
    values[40:60] = np.nan
    smoothed = smooth(values)
    assert np.isnan(smoothed[50])
    assert smoothed[30] == smoothed[70] == 1.0


def test_a_short_curve_stays_raw():
    values = np.array([3.0, 1.0, 2.0])
    np.testing.assert_array_equal(smooth(values), values)


def test_the_rate_is_the_median_so_a_stall_does_not_count():
    rows = [{"num_samples": 32, "seconds": seconds} for seconds in (100.0, 2.0, 4.0, 2.0, 1.0)]
    assert median_rate(rows, "num_samples") == 16.0


@pytest.mark.parametrize("rows", [[], [{"seconds": 1.0}], [{"num_samples": 3}], [{"num_samples": 3, "seconds": 0.0}]])
def test_a_rate_that_was_not_recorded_is_none(rows):
    assert median_rate(rows, "num_samples") is None


def test_totals_and_columns_know_gaps():
    rows = [{"step": 1, "num_samples": 32}, {"step": 2}]
    assert total(rows, "num_samples") == 32
    assert total(rows, "num_images") is None
    np.testing.assert_array_equal(column(rows, "num_samples"), [32.0, np.nan])


def test_the_last_loss_of_a_run(make_run):
    assert final_loss(make_run(losses=(3.0, 2.0))) == 2.0
    assert final_loss(make_run(losses=())) is None


def test_only_finished_training_stages_count_as_training_time(make_run, make_variant):
    stages = {"pretrain": make_run(losses=[1.0] * 5), "finetune": make_run("finetune", finished=False)}
    stages["evaluate"] = make_run("evaluate")
    assert training_seconds(make_variant(stages=stages)) == {"pretrain": 10.0}
