"""Our rows beside the paper's."""

import csv
import io
from dataclasses import replace

import pytest

from meteor.evaluation.benchmarks import BENCHMARKS
from meteor.evaluation.benchmarks.presets import PRESETS
from meteor.report.csv_files import csv_files
from meteor.report.paper import paper_rows, paper_table
from meteor.report.paper_columns import COLUMNS, Average, Note, paper_average, paper_cells
from meteor.report.study import numbers
from meteor.report.tables import FOR_JUDGE, FOR_SERVER, NOT_RUN, NOT_SCORED


def test_our_cost_stands_below_the_papers(make_variant):
    table = paper_table(4, [make_variant()])
    assert table.rows[1] == ("LLaVA-Meteor (paper)", "144", "37.08 M", "13.7 h", "29.1", "62.4")
    assert table.rows[-1] == ("meteor", "540.2", "34.98 M", "8 s", "not recorded", "not run")
    assert table.theirs == len(table.rows) - 1


@pytest.fixture
def make_answered(make_score):
    """Make the table of a set as its column in the paper defines it, unless changed."""

    def make(column, share=0.5, **changes):
        [wanted] = [each for each in COLUMNS if each.name == column]
        facts = {"benchmark": wanted.benchmark, "split": wanted.split, "metric": wanted.metric, "ocr": bool(wanted.ocr)}
        return make_score(share, **facts | changes)

    return make


def row_of(table, number=-1):
    return dict(zip(table.columns, table.rows[number], strict=True))


def test_a_benchmark_stands_in_its_column_and_other_sets_in_columns_of_their_own(
    make_variant, make_score, make_answered
):
    table = paper_table(1, [make_variant(scores={"my_gqa": make_answered("GQA", 0.649), "shapes": make_score(0.5)})])
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [row[0] for row in table.rows[table.theirs :]] == ["meteor"]
    ours = row_of(table)
    assert (ours["GQA"], ours["POPE"], ours["shapes"], ours["avg"]) == ("64.9", "", "50.0", "64.9 (1 of 12)")
    assert table.footnotes == ()


def test_of_two_sets_the_closest_to_the_papers_stands_in_the_column_and_the_other_beside(make_variant, make_answered):
    scores = {
        "textvqa": make_answered("VQA-T", 0.4, ocr=False),
        "textvqa_ocr": make_answered("VQA-T", 0.5),
        "vqav2": make_answered("VQAv2", 0.7, split="val"),
        "vqav2_test_dev": make_answered("VQAv2", None, scored_by="server"),
    }
    for names in (list(scores), list(scores)[::-1]):
        table = paper_table(1, [make_variant(scores={name: scores[name] for name in names})])
        ours = row_of(table)
        assert (ours["VQA\u2011T"], ours["textvqa"]) == ("50.0ᵃ", "40.0")
        assert (ours["VQAv2"], ours["vqav2_test_dev"]) == ("70.0ᵇ", FOR_SERVER)
        assert "textvqa_ocr" not in table.columns
        assert "vqav2" not in table.columns
        assert ours["avg"] == "50.0 (1 of 12)"
        assert table.footnotes == (
            "ᵃ with OCR tokens in the prompt, as LLaVA-1.5's 58.2",
            "ᵇ VQAv2 val instead of test-dev (not comparable)",
        )


def test_answers_that_are_scored_elsewhere_say_where(make_variant, make_answered):
    scores = {
        "mmvet": make_answered("MMVet", None, scored_by="judge"),
        "vizwiz": make_answered("VizWiz", None, scored_by="server"),
        "docvqa": make_answered("VQA-D", None, split="test"),
    }
    run = make_variant(scores=scores)
    ours = row_of(paper_table(1, [run]))
    assert (ours["MMVet"], ours["VizWiz"], ours["VQA\u2011D"]) == (FOR_JUDGE, FOR_SERVER, NOT_SCORED)
    assert (ours["avg"], row_of(paper_table(4, [run]))["Average score"]) == ("0 of 12", "0 of 12")


@pytest.mark.parametrize(
    ("column", "changes", "text"),
    [
        ("VQA-T", {"ocr": False}, "no OCR tokens in the prompt, unlike LLaVA-1.5's 58.2"),
        ("VizWiz", {"split": "val"}, "VizWiz val instead of test"),
        (
            "QA-C",
            {"metric": "relaxed_accuracy_zero_repaired"},
            "relaxed accuracy zero repaired instead of relaxed accuracy",
        ),
        ("GQA", {"long_side": 672}, "images resized to 672 pixels"),
        ("MMB", {"long_side": 1024}, "images resized to 1,024 pixels"),
        ("MMVet", {}, "scored by another judge than the paper's, which is retired"),
        ("POPE", {"limit": 100, "num_questions": 100}, "only the first 100 questions"),
        ("SEED", {"selection": {"k": 64}}, "K = 64 when answering"),
        ("SEED", {"selection": {"visual_weight": 0.0}}, "visual weight 0.0 when answering"),
        ("SEED", {"selection": {"sub_images": "global"}}, "global views alone when answering"),
        (
            "MMMU",
            {"num_global_only": 3},
            "some questions answered by global views alone, because their prompts are too long",
        ),
    ],
)
def test_a_deviation_is_marked_and_leaves_the_average(make_variant, make_answered, column, changes, text):
    cells = paper_cells([make_variant(scores={"set": make_answered(column, **changes)})])
    assert Note(text) in cells[column].notes
    assert not cells[column].is_comparable
    assert paper_average(cells) == Average(None, 0)


@pytest.mark.parametrize(
    ("column", "changes", "text"),
    [
        ("VQA-T", {}, "with OCR tokens in the prompt, as LLaVA-1.5's 58.2"),
        ("GQA", {"long_side": 1024}, "images resized to 1,024 pixels, as LLaVA-UHD's released evaluation does"),
    ],
)
def test_a_remark_is_marked_and_stays_in_the_average(make_variant, make_answered, column, changes, text):
    cells = paper_cells([make_variant(scores={"set": make_answered(column, 0.25, **changes)})])
    assert cells[column].notes == (Note(text, deviates=False),)
    assert paper_average(cells) == Average(0.25, 1)


def test_a_limit_beyond_the_last_question_changes_nothing(make_variant, make_answered):
    cells = paper_cells([make_variant(scores={"pope": make_answered("POPE", limit=100, num_questions=99)})])
    assert cells["POPE"].is_comparable


def test_only_the_average_of_twelve_comparable_cells_is_a_plain_number():
    assert str(Average(0.5834, 12)) == "58.3"
    assert str(Average(0.5834, 9)) == "58.3 (9 of 12)"
    assert str(Average(None, 0)) == "0 of 12"


def test_the_letters_of_a_cell_are_in_order(make_variant, make_answered):
    runs = [
        make_variant("a", scores={"textvqa": make_answered("VQA-T")}),
        make_variant("b", scores={"textvqa": make_answered("VQA-T", limit=9), "gqa": make_answered("GQA", limit=9)}),
    ]
    table = paper_table(1, runs)
    assert [row_of(table, i)["VQA\u2011T"] for i in (-2, -1)] == ["50.0ᵃ", "50.0ᵃᵇ"]
    assert row_of(table)["GQA"] == "50.0ᵇ"


def test_sets_outside_the_paper_do_not_count_in_table_4(make_variant, make_score, make_answered):
    scores = {
        "gqa": make_answered("GQA", 0.5),
        "nlvr": make_score(0.9),
        "gqa_val": make_answered("GQA", 0.8, split="val_all"),
    }
    assert row_of(paper_table(4, [make_variant(scores=scores)]))["Average score"] == "50.0 (1 of 12)"
    assert row_of(paper_table(4, [make_variant(scores={"nlvr": make_score(0.9)})]))["Average score"] == NOT_RUN


def test_seeds_share_a_cell_that_says_how_many_of_them_were_scored(make_variant, make_answered):
    runs = [make_variant(f"a.s{seed}", scores={"gqa": make_answered("GQA", 0.4 + 0.2 * seed)}) for seed in (0, 1)]
    runs = [replace(run, variant="a", seed=seed) for seed, run in enumerate(runs)]
    table = paper_table(2, runs)
    assert (row_of(table)["Model"], row_of(table)["GQA"], table.footnotes) == ("a", "50.0", ())
    table = paper_table(2, [runs[0], replace(runs[1], scores=None)])
    assert (row_of(table)["GQA"], table.footnotes) == ("40.0ᵃ", ("ᵃ mean over 1 of 2 seeds",))


def test_variants_that_answered_different_sets_choose_for_themselves(make_variant, make_answered):
    plain, ocr = make_answered("VQA-T", 0.4, ocr=False), make_answered("VQA-T", 0.5)
    table = paper_table(
        1,
        [
            make_variant("both", scores={"textvqa": plain, "textvqa_ocr": ocr}),
            make_variant("plain", scores={"textvqa": plain}),
            make_variant("none", scores={}),
        ],
    )
    cells = [(row_of(table, i)["VQA\u2011T"], row_of(table, i)["textvqa"]) for i in (-3, -2, -1)]
    assert cells == [("50.0ᵃ", "40.0"), ("40.0ᵇ", "see VQA-T"), (NOT_RUN, NOT_RUN)]


def test_a_studys_files_and_numbers_agree_with_its_tables(make_variant, make_answered):
    run = make_variant(scores={"gqa": make_answered("GQA", 0.5), "vqav2": make_answered("VQAv2", 0.7, split="val")})
    rows = list(csv.DictReader(io.StringIO(csv_files([run], [])["paper.csv"])))
    assert [(row["column"], row["set"], row["score"], row["comparable"], row["deviations"]) for row in rows] == [
        ("GQA", "gqa", "0.5", "True", ""),
        ("VQAv2", "vqav2", "0.7", "False", "VQAv2 val instead of test-dev"),
        ("avg", "", "0.5", "False", ""),
    ]
    assert rows[-1]["remarks"] == "1 of 12 columns"
    found = numbers(run)
    assert (found["paper/average"], found["paper/comparable_columns"]) == (0.5, 1.0)


def test_the_definition_names_benchmarks_splits_and_metrics_that_exist():
    for column in COLUMNS:
        benchmark = BENCHMARKS[column.benchmark]
        assert (benchmark.title, benchmark.metric.name) == (column.title, column.metric)
        assert column.split in benchmark.splits
        assert benchmark.has_ocr == bool(column.ocr)
        protocol = PRESETS["llava_uhd"].protocol(column.benchmark)
        assert (protocol.long_side is not None) == column.is_resized


def test_the_papers_rows_are_those_printed_with_all_benchmarks_as_columns():
    rows = paper_rows()
    assert [sum(row["table"] == str(number) for row in rows) for number in (1, 2, 3)] == [20, 2, 3]
    meteor = next(row for row in rows if row["model"] == "LLaVA-Meteor K=144")
    assert [meteor[name] for name in (*(column.name for column in COLUMNS), "avg")] == (
        ["69.9", "64.2", "59.0", "39.2", "64.9", "82.4", "59.3", "69.4", "44.7", "37.5", "89.9", "67.7", "62.4"]
    )
