"""A study's report: seeds merged, differences from the control, costs, the Pareto figure, files for spreadsheets."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from meteor.report import StudyTable, write_report
from meteor.report.canvas import variant_looks
from meteor.report.cost import answer_flops_table, answer_time_table, training_cost, training_cost_table
from meteor.report.losses import losses_table
from meteor.report.seeds import merge_seeds
from meteor.report.study import numbers, results_table
from meteor.report.study_figures import (
    frontier,
    kept_by_variants_figure,
    pareto_figure,
)

MEASURED = {
    "hardware": "one GPU",
    "num_questions": 16,
    "num_new_tokens": 33,
    "encoder_s": 0.03,
    "projector_s": 0.002,
    "prefill_s": 0.012,
    "tokens_per_s": 32.0,
    "encoder_flops": 2.5e12,
    "projector_flops": 1e11,
    "prefill_flops": 7e12,
    "token_flops": 1.25e10,
    "memory_bytes": 14_000_000_000,
    "num_prompt_tokens": 800.4,
    "num_visual_tokens": 720.0,
}


@pytest.fixture
def runs(make_variant, make_score, make_run):
    """Two variants, two seeds, four questions about three images."""
    made = []
    for name, shares, tokens, answers in (
        ("control", (0.50, 0.75), 144.0, ([1, 1, 0, 0], [1, 1, 1, 0])),
        ("better", (0.75, 1.00), 64.0, ([1, 1, 1, 0], [1, 1, 1, 1])),
    ):
        for seed, (share, scores) in enumerate(zip(shares, answers, strict=True)):
            rows = [
                {"set": "shapes", "id": str(i), "question": f"q{i}", "image": f"{i // 2}.png", "score": float(score)}
                | {"quarantined": False, "answer": "a", "prediction": "a", "type": ""}
                for i, score in enumerate(scores)
            ]
            stages = {
                stage: replace(make_run(stage), uri=f"{name}.{seed}/{stage}")
                for stage in ("pretrain", "finetune", "evaluate")
            }
            table = make_score(share, num_questions=4, by_type={"count": make_score(share)})
            variant = make_variant(
                f"{name}.s{seed}", stages=stages, scores={"shapes": table}, predictions=rows, tokens=tokens
            )
            made.append(
                replace(
                    variant,
                    variant=name,
                    seed=seed,
                    encoder_shares={"finetune": 0.25},
                    encoder_flops={"finetune": 5e14},
                )
            )
    made[2] = replace(made[2], efficiency=MEASURED)
    return made


def test_seeds_become_one_variant_with_the_range_of_their_scores(runs):
    control, better = merge_seeds(runs)
    assert (control.name, better.name) == ("control", "better")
    assert control.scores["shapes"]["score"] == 0.625
    assert control.scores["shapes"]["interval"] == [0.5, 0.75]
    assert control.scores["shapes"]["by_type"]["count"]["interval"] == [0.5, 0.75]
    assert better.predictions == runs[2].predictions


def test_one_seed_keeps_the_interval_of_its_questions(runs):
    [alone] = merge_seeds(runs[:1])
    assert alone.scores == runs[0].scores
    assert alone.name == "control"


def test_a_seed_that_was_not_evaluated_does_not_hide_the_other(runs):
    [merged] = merge_seeds([replace(runs[0], scores=None, predictions=None), runs[1]])
    assert merged.scores == runs[1].scores


def test_a_missing_difference_says_why(runs, make_score):
    spec = StudyTable("t", ("control", "better"), "control")

    def difference(better):
        return results_table(spec, [*runs[:2], *better]).rows[1][3:5]

    elsewhere = {"shapes": make_score(None, scored_by="server")}
    unscored = [replace(run, scores=elsewhere, predictions=[]) for run in runs[2:]]
    assert difference(unscored) == ("for the server", "for the server")
    other = [[{**row, "question": f"{row['question']} in short"} for row in run.predictions] for run in runs[2:]]
    reworded = [replace(run, predictions=rows) for run, rows in zip(runs[2:], other, strict=True)]
    assert difference(reworded) == ("87.5 % (75.0 – 100.0)", "other questions")
    assert difference([replace(run, scores={}, predictions=[]) for run in runs[2:]]) == ("not run", "not run")


def test_many_question_sets_have_rows_of_their_own(runs, make_score):
    names = ("a", "b", "c", "shapes")
    more = [replace(run, scores=dict.fromkeys(names, run.scores["shapes"])) for run in runs]
    table = results_table(StudyTable("t", ("control", "better"), "control"), more)
    assert table.columns == ("Question set", "Variant", *("Score", "Difference", "95 % interval", "By seed"))
    assert [row[:3] for row in table.rows[-2:]] == [
        ("Exact match, shapes", "control", "62.5 % (50.0 – 75.0)"),
        ("Exact match, shapes", "better", "87.5 % (75.0 – 100.0)"),
    ]
    assert len(table.rows) == 8


def test_results_stand_beside_their_difference_from_the_control(runs):
    table = results_table(StudyTable("t", ("control", "better", "absent"), "control"), runs)
    control, better = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert control["Exact match"] == "62.5 % (50.0 – 75.0)"
    assert control["Difference"] == "control"
    assert better["Difference"] == "+25.0"
    assert better["By seed"] == "+25.0, +25.0"
    # Two images, whose questions differ by 0 and by (0.5 + 0.5) in sum: mean 0.25, sqrt(2 (0.5^2 + 0.5^2)) / 4 = 0.25.
    assert better["95 % interval"] == "−292.7 to +342.7"
    assert better["Tokens per image"] == "64"


def test_an_answers_cost_is_that_of_its_parts_and_gaps_say_so(runs):
    times, flops = answer_time_table(runs), answer_flops_table(runs)
    control, better = (dict(zip(times.columns, row, strict=True)) for row in times.rows)
    assert control["Encoder"] == control["Answer tokens/s"] == "not recorded"
    # 30 + 2 + 10 + 32 x 31.25 ms
    parts = ("Encoder", "Projector", "Prompt pass", "Each token", "Whole answer", "Encoder's share")
    assert [better[name] for name in parts] == ["30 ms", "2 ms", "10 ms", "31.2 ms", "1.04 s", "2.9 %"]
    assert (better["Answer tokens/s"], better["Memory"]) == ("32", "14 GB")
    # 2.5 + 0.1 + 7 + 32 x 0.0125 TFLOP
    better = dict(zip(flops.columns, flops.rows[1], strict=True))
    counted = ["2.5 TFLOP", "100 GFLOP", "7 TFLOP", "12.5 GFLOP", "10 TFLOP", "25.0 %"]
    assert [better[name] for name in parts] == counted
    assert flops.rows[0][2:] == ("not recorded",) * 6


def test_what_an_earlier_release_measured_has_gaps(runs):
    old = {name: MEASURED[name] for name in ("hardware", "num_prompt_tokens", "tokens_per_s", "memory_bytes")}
    [row] = answer_time_table([replace(runs[2], efficiency=old)]).rows
    assert row[1:] == ("800", *["not recorded"] * 6, "32", "14 GB")


def test_training_costs_are_those_of_the_steps_and_with_the_encoder_in_them(runs):
    """Two steps of 2 s; 500 TFLOP of encoding at 2.5 TFLOP in 30 ms are 6 s of one worker."""
    table = training_cost_table(runs)
    _, better = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    # 3,840 tokens in each step.
    assert better["Training tokens/s"] == "1,920"
    assert better["Encoder FLOPs"] == "500 TFLOP"
    assert better["Encoder's share"] == "25.0 %"
    assert better["MFU"] == "not recorded"
    stage = runs[2].stages["finetune"]
    rows = [{**row, "mfu": 0.3} for row in stage.metrics]
    settings = {**stage.settings, "runtime": {"num_workers": 2}}
    run = replace(runs[2], stages={"finetune": replace(stage, metrics=rows, settings=settings)})
    assert training_cost(run) == pytest.approx(
        {"steps_s": 4, "live_s": 4 + 3, "mfu": 0.3, "live_mfu": 0.3 / 0.75 * 4 / 7}
    )
    live = {**settings, "finetune": {"features": "live"}}
    run = replace(run, stages={"finetune": replace(stage, metrics=rows, settings=live)})
    assert training_cost(run) == pytest.approx({"live_s": 4, "live_mfu": 0.3 / 0.75})


def test_losses_stand_beside_the_controls_with_the_time_of_steps_and_encoding(runs):
    def change(run, features, shift):
        stages = {}
        for name in ("pretrain", "finetune"):
            rows = [{**row, "loss": row["loss"] + shift * row["step"]} for row in run.stages[name].metrics]
            settings = {name: {"features": features}, "runtime": {"num_workers": 2}}
            stages[name] = replace(run.stages[name], metrics=rows, settings=settings)
        return replace(run, stages=stages, encoding_s=5.0)

    cached, live = change(runs[0], "cache", 0), change(runs[2], "live", 0.25)
    table = losses_table(StudyTable("t", ("control", "better"), "control", losses=True), [cached, live])
    control, better = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    last = max(row["step"] for row in cached.stages["finetune"].metrics)
    assert control["Largest difference, finetune"] == "control"
    assert better["Largest difference, finetune"] == f"{0.25 * last:.2g}"
    # Two stages of two steps of 2 s on two workers.
    assert [control[name] for name in table.columns[-3:]] == ["16 s", "5 s", "21 s"]
    assert [better[name] for name in table.columns[-3:]] == ["16 s", "in the steps", "16 s"]


def test_numbers_are_those_of_one_run(runs):
    found = numbers(runs[2])
    assert found["shapes/exact_match"] == 0.75
    assert found["answers/tokens_per_s"] == 32
    assert found["encoder_share/finetune"] == 0.25
    assert found["training_seconds"] == 8
    assert found["finetune_cost/steps_s"] == 4
    assert all(isinstance(value, float) for value in found.values())


def test_the_frontier_leaves_out_what_fewer_tokens_beat():
    points = [
        ("a", 32, 50, 50, 50),
        ("b", 64, 45, 45, 45),
        ("c", 64, 55, 55, 55),
        ("d", 144, 55, 55, 55),
        ("e", 576, 60, 60, 60),
    ]
    assert [name for name, *_ in frontier(points)] == ["a", "c", "e"]


def test_the_pareto_figure_names_the_best_and_needs_a_score(runs):
    looks = variant_looks(["control", "better"])
    assert pareto_figure(runs, looks).alt.endswith("shapes: better.")
    assert pareto_figure([replace(run, scores=None) for run in runs], looks) is None
    assert pareto_figure(runs[:1], looks).png


def test_several_variants_of_one_image_are_rows_of_one_figure(make_panel):
    panels = [replace(make_panel(), variant=name) for name in ("a", "b")]
    one, two = (kept_by_variants_figure(panels[:count], "kept") for count in (1, 2))
    assert two.height > one.height
    assert two.alt.endswith("kept patches of a, b.")


def test_the_pages_of_a_study_hold_tables_differences_files_and_the_papers_rows(tmp_path, runs, make_panel):
    panels = [replace(make_panel(), variant=name) for name in ("control", "better")]
    paths = write_report(
        str(tmp_path),
        title="study",
        variants=runs,
        panels=panels,
        thumbnails={"0.png": Image.new("RGB", (30, 20))},
        tables=[
            StudyTable("Tokens", ("control", "better"), "control", 3),
            StudyTable("Cost", ("better",), "better", 4),
        ],
    )
    for page in (Path(paths.markdown).read_text(), Path(paths.html).read_text()):
        for expected in (
            "Tokens",
            "experts=visual (paper)",
            "+25.0",
            "one GPU",
            "runs.csv",
            "137.84 M",
            "62.5 % (50.0 – 75.0)",
        ):
            assert expected in page, expected
    assert Path(paths.html).read_text().count('<tr class="theirs">') == 3 + 4
    assert "| *experts=visual (paper)* |" in Path(paths.markdown).read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("control", "0"),
        ("control", "1"),
        ("better", "0"),
        ("better", "1"),
    ]
    assert rows[3]["shapes/exact_match"] == "1.0"
    [difference] = csv.DictReader(io.StringIO((tmp_path / "differences.csv").read_text()))
    assert (difference["variant"], difference["difference"], difference["seed_1"]) == ("better", "0.25", "0.25")
    scores = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert {row["type"] for row in scores} == {"", "count"}
    assert (tmp_path / "figures/pareto.png").exists()
    assert (tmp_path / "figures/kept_01.png").exists()
    assert not (tmp_path / "figures/kept_02.png").exists()
