"""Numbers of the paper (arXiv 2505.11945, Tables 1 to 4), and ours in the same layout."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from meteor.report.data import RunResult
from meteor.report.paper_columns import COLUMNS, Cell, Note, paper_average, paper_cells
from meteor.report.seeds import by_variant
from meteor.report.tables import (
    MARKS,
    NOT_RECORDED,
    NOT_RUN,
    Table,
    format_size,
    format_tokens,
    format_training_time,
    mean_score,
    question_sets,
)

Groups = Mapping[str, Sequence[RunResult]]
Cells = Mapping[str, Cell]

REMARKS = (
    "Shaded rows marked (paper) are printed in the paper: LLaVA-UHD and LLaVA-Meteor with Vicuna-13B, 595K / 665K samples, "
    "eight H800; other models as their authors published them.",
    "The paper counts tokens differently: about 256, 114 and 56 per image for K = 144, 64 and 32 would mean 1.78 sub-images "
    "per image, while the slicing rule cuts a 640 × 480 image into five (720 tokens at K = 144). Our numbers are measured.",
    "Unless a row says otherwise, it has both experts, the local-to-single scan, and K = 144.",
    "Some averages in the paper are not the mean of their row; they are shown as printed.",
    f"The paper does not state how it evaluates. Its columns are read as {'; '.join(map(str, COLUMNS))}.",
    "Our average is that of the cells that compare with the paper's columns, and says of how many it is unless all twelve do.",
)

# Columns of the paper's Tables 1 to 3.
BENCHMARKS = tuple(column.name for column in COLUMNS)
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


def paper_table(number: int, runs: Sequence[RunResult]) -> Table:
    """Lay out our results as in a table of the paper, below the paper's rows.

    Args:
        number: number of the paper's table, 1 to 4.
        runs: results per variant and seed; seeds are averaged.
    """
    groups = by_variant(runs)
    cells = {variant: paper_cells(mine) for variant, mine in groups.items()}
    return _efficiency(groups, cells) if number == 4 else _scores(number, groups, cells)


def _scores(number: int, groups: Groups, cells: Mapping[str, Cells]) -> Table:
    theirs = [row for row in paper_rows() if row["table"] == str(number)]
    others = _other_sets(groups, cells)
    columns = ("Model", "LLM", "Tokens", *map(_unbroken, BENCHMARKS), "avg", *others)
    rows = [
        (
            f"{_unbroken(row['model'])} (paper)",
            _unbroken(row["llm"]),
            row["tokens"],
            *(row[benchmark] for benchmark in (*BENCHMARKS, "avg")),
            *[""] * len(others),
        )
        for row in theirs
    ]
    footnotes = _Footnotes()
    answered = {column for mine in cells.values() for column in mine}
    for variant, mine in groups.items():
        found = cells[variant]
        gaps = {column: NOT_RUN if column in answered else "" for column in BENCHMARKS}
        in_columns = {cell.question_set: column for column, cell in found.items()}
        rows.append(
            (
                variant,
                _unbroken(_llm(mine[0])),
                format_tokens(mine[0].num_visual_tokens_per_image),
                *(footnotes.mark(found[name]) if name in found else gaps[name] for name in BENCHMARKS),
                str(paper_average(found)) if found else "",
                *(f"see {in_columns[name]}" if name in in_columns else mean_score(mine, name) for name in others),
            )
        )
    return Table(columns, tuple(rows), theirs=len(theirs), footnotes=footnotes.lines())


def _other_sets(groups: Groups, cells: Mapping[str, Cells]) -> list[str]:
    """Return the sets with a column of their own: those that some variant answered besides the set in the paper's column."""
    others = {
        name
        for variant, mine in groups.items()
        for name in set(question_sets(mine)) - {cell.question_set for cell in cells[variant].values()}
    }
    return [name for name in question_sets([run for mine in groups.values() for run in mine]) if name in others]


def _efficiency(groups: Groups, cells: Mapping[str, Cells]) -> Table:
    columns = ("Model", "Tokens", "Projector", "Training", "Tokens/s", "Average score")
    rows = [*_EFFICIENCY]
    for variant, mine in groups.items():
        measured = next((run for run in mine if run.efficiency), mine[0])
        rows.append(
            (
                variant,
                format_tokens(measured.num_visual_tokens_per_image),
                format_size(measured),
                format_training_time(measured),
                f"{measured.efficiency['tokens_per_s']:.3g}" if measured.efficiency else NOT_RECORDED,
                str(paper_average(cells[variant])) if cells[variant] else NOT_RUN,
            )
        )
    return Table(columns, tuple(rows), theirs=len(_EFFICIENCY))


class _Footnotes:
    """Letters of footnotes, in the order in which cells need them."""

    def __init__(self) -> None:
        self._letters: dict[Note, str] = {}

    def mark(self, cell: Cell) -> str:
        """Format a cell with the letters of its notes; the notes of a cell without a score have nothing to qualify."""
        if cell.score is None:
            return cell.reason
        for note in cell.notes:
            self._letters.setdefault(note, _letter(len(self._letters)))
        letters = [letter for note, letter in self._letters.items() if note in cell.notes]
        return f"{100 * cell.score:.1f}{''.join(letters)}"

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"{letter} {note.text}{' (not comparable)' if note.deviates else ''}"
            for note, letter in self._letters.items()
        )


def _letter(index: int) -> str:
    repeats, place = divmod(index, len(MARKS))
    return MARKS[place] * (repeats + 1)


def _unbroken(name: str) -> str:
    """Replace hyphens, at which narrow columns would break a name into short lines."""
    return name.replace("-", "\u2011")


def _llm(run: RunResult) -> str:
    settings = next((stage.settings for stage in run.stages.values()), {})
    return str(settings.get("llm", {}).get("path", NOT_RECORDED)).rstrip("/").rpartition("/")[2]
