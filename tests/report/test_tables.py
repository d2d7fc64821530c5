"""Cells of the tables."""

import pytest

from meteor.report.canvas import MANY_VARIANTS
from meteor.report.tables import (
    NOT_FINISHED,
    NOT_RECORDED,
    NOT_RUN,
    cache_table,
    difference_table,
    headline_table,
    score_table,
    stage_table,
)


def test_the_headline_lays_cost_beside_score(make_variant, make_score):
    table = headline_table([make_variant(scores={"shapes": make_score(0.8125)})])
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "Variant": "meteor",
        "Visual tokens per image": "540.2",
        "Projector parameters": "34.98 M",
        "Exact match": "81.2 % (71.2 – 91.2)",
        "Training time": "8 s",
        "Samples/s": "16.0",
    }


def test_each_question_set_has_its_own_column(make_variant, make_score):
    variants = [make_variant("a", scores={"x": make_score()}), make_variant("b", scores={"y": make_score()})]
    table = headline_table(variants)
    assert table.columns[3:5] == ("Exact match, x", "Exact match, y")
    assert [row[3:5] for row in table.rows] == [("50.0 % (40.0 – 60.0)", NOT_RUN), (NOT_RUN, "50.0 % (40.0 – 60.0)")]


def test_many_question_sets_are_rows_of_the_headline(make_variant, make_score):
    scores = {name: make_score() for name in "abcdefg"}
    table = headline_table([make_variant("x", scores=scores), make_variant("y", scores=scores)])
    assert table.columns == ("Variant", "x", "y")
    assert table.rows[0] == ("Visual tokens per image", "540.2", "540.2")
    assert [row[0] for row in table.rows[2:9]] == [f"Exact match, {name}" for name in scores]


def test_what_is_missing_in_the_headline_is_said(make_variant):
    table = headline_table([make_variant(stages={}, parameters=None, tokens=None)])
    assert table.rows == (("meteor", NOT_RECORDED, NOT_RECORDED, NOT_RUN, NOT_RUN, NOT_RUN),)


def test_training_time_of_half_a_training_says_so(make_run, make_variant):
    stages = {"pretrain": make_run(losses=[1.0] * 45), "finetune": make_run("finetune", finished=False)}
    assert headline_table([make_variant(stages=stages)]).rows[0][4] == "1 min 30 s (pretrain only)"


def test_a_stage_has_totals_and_rates(make_run, make_variant):
    variants = [
        make_variant("a", stages={"pretrain": make_run(losses=[3.0] * 50)}),
        make_variant("b", stages={"pretrain": make_run(losses=(), finished=False)}),
        make_variant("c", stages={}),
    ]
    rows = stage_table(variants, "pretrain").rows
    assert rows[0] == ("a", "50", "1,600", "3.000", "1 min 40 s", "16.0", "1,600", "320")
    assert rows[1] == ("b", *[NOT_RECORDED] * 3, NOT_FINISHED, *[NOT_RECORDED] * 3)
    assert rows[2] == ("c", *[NOT_RUN] * 7)


def test_scores_are_laid_out_by_type(make_variant, make_score):
    one = make_score(0.5, by_type={"count": make_score(0.25, num_questions=600, majority=0.4)})
    other = make_score(0.75, num_questions=1000, by_type={"colour": make_score(0.9, num_questions=7)})
    variants = [make_variant("a", scores={"x": one}), make_variant("b", scores={"x": other}), make_variant("c")]

    table = score_table(variants, "x")

    assert table.columns == ("Type", "Questions", "Majority answer", "a", "b", "c")
    assert table.rows == (
        ("all questions", "1,200 / 1,000", "25.0 %", "50.0 % (40.0 – 60.0)", "75.0 % (65.0 – 85.0)", NOT_RUN),
        ("colour", "7", "25.0 %", NOT_RUN, "90.0 % (80.0 – 100.0)", NOT_RUN),
        ("count", "600", "40.0 %", "25.0 % (15.0 – 35.0)", NOT_RUN, NOT_RUN),
    )


def make_settings(name, **projector):
    return {"name": name, "seed": 0, "projector": projector}


def test_only_differing_settings_are_listed(make_run, make_variant):
    a, b = make_settings("a", k=144, scan="single"), make_settings("b", k=64)
    variants = [
        make_variant("a", stages={stage: make_run(stage, settings=a) for stage in ("pretrain", "finetune")}),
        make_variant("b", stages={"pretrain": make_run(settings=b)}),
    ]
    table = difference_table(variants)
    assert table.columns == ("Setting", "a", "b")
    assert table.rows == (("projector.k", "144", "64"), ("projector.scan", "single", "not set"))


def test_a_projector_named_like_its_variant_is_a_difference_and_the_runs_name_is_none(make_run, make_variant):
    def make(name):
        settings = {"name": name, "projector": {"name": name}, "report": {"compare": [name]}}
        return make_variant(name, stages={"pretrain": make_run(settings=settings)})

    assert difference_table([make("meteor"), make("mlp")]).rows == (("projector.name", "meteor", "mlp"),)


def test_a_setting_that_changed_between_a_variants_stages_is_listed_by_stage(make_run, make_variant):
    def make_stages(first, second):
        return {"pretrain": make_run(settings={"lr": first}), "finetune": make_run("finetune", settings={"lr": second})}

    table = difference_table([make_variant("a", stages=make_stages(1, 2)), make_variant("b", stages=make_stages(1, 3))])
    assert table.rows == (("lr (finetune)", "2", "3"),)


def test_a_question_set_is_one_difference(make_run, make_variant):
    def make(name, **sets):
        settings = {"data": {"evaluate": sets}}
        return make_variant(name, stages={"evaluate": make_run("evaluate", settings=settings)})

    plain = {"format": "textvqa", "path": "/x", "split": None, "ocr": None, "compat": True, "verdicts": None}
    moved = {**plain, "path": "/y"}
    table = difference_table([make("a", t=plain, u=plain), make("b", t=moved, u={**plain, "ocr": True}, v=plain)])
    assert table.rows == (
        ("data.evaluate.u", "textvqa", "textvqa, ocr: true"),
        ("data.evaluate.v", "not set", "textvqa"),
    )


@pytest.mark.parametrize("stages", [{}, None])
def test_variants_without_differences_have_no_table(make_variant, stages):
    assert difference_table([make_variant("a", stages=stages), make_variant("b", stages=stages)]) is None


def test_many_variants_with_few_differences_stand_below_each_other(make_run, make_variant):
    variants = [make_variant(f"k{k}", stages={"pretrain": make_run(settings={"k": k})}) for k in range(5)]
    table = difference_table(variants)
    assert table.columns == ("Variant", "k")
    assert table.rows == (("k0", "0"), ("k1", "1"), ("k2", "2"), ("k3", "3"), ("k4", "4"))


def test_the_cache_is_told_in_readable_units():
    cache = {
        "num_distinct_images": 1312004,
        "payload_bytes": 5_912_000_000,
        "codec": "float16",
        "cache_key": None,
        "quarantine_reasons": {"truncated": 12000},
    }
    assert cache_table(cache).rows == (
        ("distinct images", "1,312,004"),
        ("payload", "5.91 GB"),
        ("codec", "float16"),
        ("cache key", "none"),
        ("quarantine reasons: truncated", "12,000"),
    )


def test_scores_of_many_variants_stand_below_each_other(make_variant, make_score):
    scores = {"shapes": make_score(by_type={"count": make_score(0.25), "colour": make_score()})}
    few, many = (
        score_table([make_variant(f"v{i}", scores=scores) for i in range(count)], "shapes")
        for count in (MANY_VARIANTS, MANY_VARIANTS + 1)
    )
    assert few.columns[3:] == tuple(f"v{i}" for i in range(MANY_VARIANTS))
    assert many.columns == ("Variant", "all questions", "colour", "count")
    assert [row[0] for row in many.rows] == [
        "Questions",
        "Majority answer",
        *(f"v{i}" for i in range(MANY_VARIANTS + 1)),
    ]


def test_a_stage_that_variants_share_tells_nothing_of_what_differs(make_variant, make_run):
    shared = make_run(settings={"lr": 1, "tracking": {"used_by": ["a", "b"]}})
    variants = [
        make_variant(name, stages={"pretrain": shared, "finetune": make_run("finetune", settings={"lr": lr})})
        for name, lr in (("a", 1), ("b", 2))
    ]
    assert difference_table(variants).rows == (("lr", "1", "2"),)
