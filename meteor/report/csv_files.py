"""Numbers of a study as CSV files, for spreadsheets and notebooks."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meteor.report.data import RunResult, StudyTable
from meteor.report.paired import paired_difference
from meteor.report.paper_columns import COLUMNS, paper_average, paper_cells
from meteor.report.seeds import by_variant
from meteor.report.study import numbers
from meteor.report.tables import question_sets


def csv_files(runs: Sequence[RunResult], tables: Sequence[StudyTable]) -> dict[str, str]:
    """Return file name -> content of the file.

    - ``runs.csv`` has a row per run, with variant, seed and every number of `meteor.report.study.numbers`.
    - ``scores.csv`` has a row per run, question set and type of question.
    - ``differences.csv`` has a row per table, variant and question set.
    - ``paper.csv`` has a row per variant and column of the paper's tables, and one for the average of comparable columns.

    Scores and differences are shares, not percentages.
    """
    return {
        "runs.csv": _write({"run": run.name, "variant": run.group, "seed": run.seed, **numbers(run)} for run in runs),
        "scores.csv": _write(_score_rows(runs)),
        "differences.csv": _write(_difference_rows(runs, tables)),
        "paper.csv": _write(_paper_rows(runs)),
    }


def _score_rows(runs: Sequence[RunResult]) -> Iterable[Mapping[str, Any]]:
    for run in runs:
        for name, table in (run.scores or {}).items():
            for kind, entry in [("", table), *table["by_type"].items()]:
                yield {
                    "run": run.name,
                    "variant": run.group,
                    "seed": run.seed,
                    "set": name,
                    "type": kind,
                    "metric": table["metric"],
                    "score": entry["score"],
                    "low": (entry["interval"] or (None, None))[0],
                    "high": (entry["interval"] or (None, None))[1],
                    "num_questions": entry["num_questions"],
                    "majority_score": entry["majority_score"],
                }


def _difference_rows(runs: Sequence[RunResult], tables: Sequence[StudyTable]) -> Iterable[Mapping[str, Any]]:
    groups = by_variant(runs)
    for table in tables:
        control = groups.get(table.control, [])
        for variant in table.variants:
            for name in question_sets(runs):
                found = paired_difference(groups.get(variant, []), control, name) if variant != table.control else None
                if found is not None:
                    low, high = found.interval or (None, None)
                    yield {
                        "table": table.title,
                        "variant": variant,
                        "control": table.control,
                        "set": name,
                        "difference": found.mean,
                        "low": low,
                        "high": high,
                        "num_questions": found.num_questions,
                        "num_images": found.num_images,
                        **{f"seed_{seed}": value for seed, value in found.by_seed.items() if seed is not None},
                    }


def _paper_rows(runs: Sequence[RunResult]) -> Iterable[Mapping[str, Any]]:
    for variant, mine in by_variant(runs).items():
        cells = paper_cells(mine)
        for name, cell in cells.items():
            yield {
                "variant": variant,
                "column": name,
                "set": cell.question_set,
                "score": cell.score,
                "comparable": cell.is_comparable,
                "deviations": "; ".join(note.text for note in cell.notes if note.deviates),
                "remarks": "; ".join([*filter(None, [cell.reason]), *(n.text for n in cell.notes if not n.deviates)]),
            }
        if cells:
            average = paper_average(cells)
            yield {
                "variant": variant,
                "column": "avg",
                "score": average.score,
                "comparable": average.num_cells == len(COLUMNS),
                "remarks": f"{average.num_cells} of {len(COLUMNS)} columns",
            }


def _write(rows: Iterable[Mapping[str, Any]]) -> str:
    table = list(rows)
    columns = list(dict.fromkeys(key for row in table for key in row))
    sink = io.StringIO()
    writer = csv.DictWriter(sink, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return sink.getvalue()
