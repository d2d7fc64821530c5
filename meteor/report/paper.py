"""Numbers of the paper (arXiv 2505.11945, Tables 1 to 4), and ours in the same layout."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from statistics import mean

from meteor.report.data import VariantResult
from meteor.report.seeds import by_variant
from meteor.report.tables import (
    NOT_RECORDED,
    NOT_RUN,
    Table,
    format_size,
    format_tokens,
    format_training_time,
    question_sets,
    shares_right,
)

Groups = Mapping[str, Sequence[VariantResult]]

REMARKS = (
    "Shaded rows marked (paper) are printed in the paper: LLaVA-UHD and LLaVA-Meteor with Vicuna-13B, 595K / 665K samples, "
    "eight H800; other models as their authors published them.",
    "The paper counts tokens differently: about 256, 114 and 56 per image for K = 144, 64 and 32 would mean 1.78 sub-images "
    "per image, while the slicing rule cuts a 640 × 480 image into five (720 tokens at K = 144). Our numbers are measured.",
    "Unless a row says otherwise, it has both experts, the local-to-single scan, and K = 144.",
    "Some averages in the paper are not the mean of their row; they are shown as printed.",
)

# Columns of the paper's Tables 1 to 3; the scores of a question set name the set's column.
BENCHMARKS = ("VQA-T", "VQA-D", "QA-C", "VQA-I", "GQA", "VQAv2", "VizWiz", "MMB", "MMVet", "MMMU", "POPE", "SEED")
# Table 4: tokens, projector, training, tokens/s, average.
_EFFICIENCY = (
    ("LLaVA-UHD (paper)", "144", "137.84 M", "17.2 h", "28.4", "60.4"),
    ("LLaVA-Meteor (paper)", "144", "37.08 M", "13.7 h", "29.1", "62.4"),
    ("LLaVA-Meteor (paper)", "64", "37.08 M", "12.9 h", "31.3", "61.0"),
    ("LLaVA-Meteor (paper)", "32", "37.08 M", "12.1 h", "32.9", "59.3"),
)


@cache
def paper_rows() -> tuple[Mapping[str, str], ...]:
    """Read the rows of the paper's Tables 1 to 3 (arXiv 2505.11945) as printed; ``paper_tables.csv`` has the columns."""
    text = (files("meteor.report") / "paper_tables.csv").read_text()
    return tuple(csv.DictReader(text.splitlines()))


def paper_table(number: int, runs: Sequence[VariantResult]) -> Table:
    """Lay out our results as in a table of the paper, below the paper's rows.

    Args:
        number: number of the paper's table, 1 to 4.
        runs: results per variant and seed; seeds are averaged.
    """
    groups = by_variant(runs)
    return _efficiency(groups) if number == 4 else _scores(number, groups)


def _scores(number: int, groups: Groups) -> Table:
    runs = [run for mine in groups.values() for run in mine]
    theirs = [row for row in paper_rows() if row["table"] == str(number)]
    columns_of = {name: _column(runs, name) for name in question_sets(runs)}
    others = [name for name, column in columns_of.items() if not column]
    # With a normal hyphen, narrow columns would break the names into lines of two letters.
    benchmarks = [name.replace("-", "\u2011") for name in BENCHMARKS]
    columns = ("Model", "LLM", "Tokens", *others, *benchmarks, "avg")
    rows = [
        (
            f"{row['model']} (paper)",
            row["llm"],
            row["tokens"],
            *[""] * len(others),
            *(row[benchmark] for benchmark in (*BENCHMARKS, "avg")),
        )
        for row in theirs
    ]
    for variant, mine in groups.items():
        cells = {columns_of[name]: name for name in question_sets(mine) if columns_of[name]}
        rows.append(
            (
                variant,
                _llm(mine[0]),
                format_tokens(mine[0].num_visual_tokens_per_image),
                *(_mean_score(mine, name) for name in others),
                *(_mean_score(mine, cells[name]) if name in cells else "" for name in BENCHMARKS),
                "",
            )
        )
    return Table(columns, tuple(rows), theirs=len(theirs))


def _efficiency(groups: Groups) -> Table:
    columns = ("Model", "Tokens", "Projector", "Training", "Tokens/s", "Average score")
    rows = [*_EFFICIENCY]
    for variant, mine in groups.items():
        measured = next((run for run in mine if run.efficiency), mine[0])
        scores = [share for name in question_sets(mine) for share in shares_right(mine, name)]
        rows.append(
            (
                variant,
                format_tokens(measured.num_visual_tokens_per_image),
                format_size(measured),
                format_training_time(measured),
                f"{measured.efficiency['tokens_per_s']:.3g}" if measured.efficiency else NOT_RECORDED,
                f"{100 * mean(scores):.1f}" if scores else NOT_RUN,
            )
        )
    return Table(columns, tuple(rows), theirs=len(_EFFICIENCY))


def _column(runs: Sequence[VariantResult], question_set: str) -> str:
    """Return the column of the paper's tables for a question set; "" if it is none of the paper's benchmarks."""
    found = next(run.scores[question_set] for run in runs if run.scores and question_set in run.scores)
    return found.get("column", "")


def _llm(run: VariantResult) -> str:
    settings = next((stage.settings for stage in run.stages.values()), {})
    return str(settings.get("llm", {}).get("path", NOT_RECORDED)).rstrip("/").rpartition("/")[2]


def _mean_score(runs: Sequence[VariantResult], question_set: str) -> str:
    shares = shares_right(runs, question_set)
    return f"{100 * mean(shares):.1f}" if shares else NOT_RUN
