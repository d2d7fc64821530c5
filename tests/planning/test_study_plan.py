"""A study's plan worked by hand."""

import pytest

from meteor.planning.rates import Rate, weighted_rate
from meteor.planning.study_plan import CacheRow, StageWork, StudyPlan


def make_plan(**changes):
    arguments = {
        "name": "study",
        "work": (
            StageWork("cache_features", 1, 1, 0, 3600 * 500, "sub-images", Rate(500, "measured by 1 finished stage")),
            StageWork("pretrain", 2, 1, 1, 7.2e18, "FLOP", Rate(4e14, "given")),
            StageWork("evaluate", 3, 0, 0, 900, "questions", None),
        ),
        "caches": (CacheRow("float16", 20, 20, 3, 2 * 10**12), CacheRow("int8", 20, 0, 1, 10**12)),
        "checkpoint_bytes": 10**11,
        "avoided_sub_images": 3600 * 500 * 2,
        "encoder_rate": Rate(500, "given"),
        "num_workers": 4,
        "worker": "GPU",
        "states": {"a": {"cache_features": "to do"}, "b": {"cache_features": "with a", "pretrain": "finished"}},
        "parallel": None,
    }
    return StudyPlan(**{**arguments, **changes})


def test_hours_are_work_over_rate():
    plan = make_plan()
    # 1.8 M sub-images at 500 per second; 7.2e18 FLOP at 4e14 per second are 5 hours; without a rate nothing is counted.
    assert [work.hours for work in plan.work] == [1.0, 5.0, None]
    assert plan.hours == 6
    assert plan.avoided_hours == 2


def test_a_stage_without_work_takes_no_time_at_any_rate():
    assert StageWork("evaluate", 3, 0, 3, 0, "questions", None).hours == 0


def test_the_text_says_hours_money_and_what_is_avoided():
    text = make_plan().to_text(usd_per_gb=0.02, usd_per_gpu_hour=3)
    assert "at least 1.5 hours on 4 GPUs, 18 USD" in text
    assert "cache, float16    20 images, 20 to encode; read by 3 runs; 2 TB, 40.00 USD per month" in text
    assert "20 images, nothing to encode; read by 1 run;" in text
    assert "not known before a stage has finished" in text
    assert "2 GPU hours, 25.0 % of the total without a cache" in text
    assert "as many as fit the cluster" in text


def test_every_run_has_a_line_with_the_state_of_its_stages():
    rows = [line.split() for line in make_plan().to_text().splitlines()[-3:]]
    assert rows == [["run", "cache_features", "pretrain"], ["a", "to", "do", "-"], ["b", "with", "a", "finished"]]


def test_json_has_money_only_at_a_price():
    content = make_plan().to_dict(usd_per_gb=0.02, usd_per_gpu_hour=None)
    assert content["usd"] is None
    assert content["usd_per_month"] == pytest.approx(62)
    assert content["work"][1]["hours"] == 5


def test_measured_stages_weigh_by_their_seconds():
    assert weighted_rate([(100, 1), (100, 9)], "x").per_s == 20
    assert weighted_rate([], "x") is None
