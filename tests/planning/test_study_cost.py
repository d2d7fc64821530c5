"""Costs worked by hand."""

import pytest

from meteor.planning.study_cost import Rate, StudyCost, Work, weighted_rate


def make_cost(**changes):
    arguments = {
        "name": "study",
        "num_variants": 3,
        "work": (
            Work("cache_features", 1, 3600 * 500, "sub-images", Rate(500, "measured by 1 runs")),
            Work("pretrain", 2, 7.2e18, "FLOP", Rate(4e14, "given")),
            Work("evaluate", 3, 900, "questions", None),
        ),
        "cache_bytes": {"float16": 2 * 10**12, "int8": 10**12},
        "checkpoint_bytes": 10**11,
        "avoided_sub_images": 3600 * 500 * 2,
        "encoder_rate": Rate(500, "given"),
        "num_gpus": 4,
    }
    return StudyCost(**{**arguments, **changes})


def test_hours_are_work_over_rate():
    cost = make_cost()
    # 1.8 M sub-images at 500 a second; 7.2e18 FLOP at 4e14 a second are 5 hours; what no rate is known of is left out.
    assert [one.gpu_hours for one in cost.work] == [1.0, 5.0, None]
    assert cost.gpu_hours == 6
    assert cost.avoided_gpu_hours == 2


def test_the_text_says_hours_money_and_what_is_avoided():
    text = make_cost().to_text(usd_per_gb=0.02, usd_per_gpu_hour=3)
    assert "1.5 hours on 4 GPUs, 18 USD" in text
    assert "cache, float16    2 TB, 40.00 USD a month" in text
    assert "no rate known" in text
    assert "2 GPU hours, 25.0 % of what there would be without it" in text


def test_json_has_money_only_at_a_price():
    content = make_cost().to_dict(usd_per_gb=0.02, usd_per_gpu_hour=None)
    assert content["usd"] is None
    assert content["usd_per_month"] == pytest.approx(62)
    assert content["work"][1]["gpu_hours"] == 5


def test_measured_runs_weigh_by_their_seconds():
    assert weighted_rate([(100, 1), (100, 9)], "x").per_s == 20
    assert weighted_rate([], "x") is None
