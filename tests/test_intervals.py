"""Intervals of scores whose questions share images."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meteor.intervals import mean_influences, share_interval, standard_error, student_interval


def test_independent_questions_have_the_textbook_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    # s / sqrt(n) with n - 1 in the variance: sqrt(0.3 / 5).
    assert standard_error(mean_influences(values), range(5)) == pytest.approx(math.sqrt(0.3 / 5))


def test_an_image_asked_four_times_tells_no_more_than_once():
    once = standard_error(mean_influences([1.0, 0.0, 1.0]), "abc")
    often = standard_error(mean_influences([1.0] * 4 + [0.0] * 4 + [1.0] * 4), "aaaabbbbcccc")
    assert often == pytest.approx(once)
    assert standard_error(mean_influences([1.0, 0.0]), "aa") is None


@pytest.mark.parametrize("num_clusters", [20, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(num_clusters):
    """2,000 samples of images with 5 correlated answers each, right in a share of 0.9."""
    generator = np.random.default_rng(0)
    covered = differences = 0
    clusters = np.repeat(np.arange(num_clusters), 5).tolist()
    for _ in range(2000):
        hard = generator.random((num_clusters, 1)) < 0.2
        values = (generator.random((num_clusters, 5)) < np.where(hard, 0.5, 1.0)).astype(float).ravel().tolist()
        share, error = float(np.mean(values)), standard_error(mean_influences(values), clusters)
        low, high = share_interval(share, error, num_clusters)
        covered += low <= 0.9 <= high
        noise = (generator.normal(size=(num_clusters, 1)) + generator.normal(size=(num_clusters, 5))).ravel().tolist()
        low, high = student_interval(
            float(np.mean(noise)), standard_error(mean_influences(noise), clusters), num_clusters
        )
        differences += low <= 0 <= high
    assert 0.92 < covered / 2000 < 0.98
    assert 0.93 < differences / 2000 < 0.97


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=2, max_size=30).filter(
        lambda rows: len({cluster for _, cluster in rows}) > 1
    )
)
def test_an_interval_of_a_score_stays_in_0_to_1_and_holds_it(rows):
    values = [value for value, _ in rows]
    share = min(max(sum(values) / len(values), 0.0), 1.0)
    error = standard_error(mean_influences(values), [cluster for _, cluster in rows])
    low, high = share_interval(share, error, len({cluster for _, cluster in rows}))
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1


def test_all_right_is_not_certain():
    low, high = share_interval(1.0, 0.0, 10)
    # Wilson with n = 10 and t(9) = 2.262: 1 / (1 + 2.262^2 / 10).
    assert (low, high) == (pytest.approx(1 / (1 + 2.262157**2 / 10), abs=1e-5), 1.0)
