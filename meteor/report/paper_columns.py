"""Columns of the paper's Tables 1 to 3: the evaluation behind each column, and our question set that stands in it.

The paper (arXiv 2505.11945) does not state how it evaluates. It repeats published numbers whose protocol is known, so the
columns are read as those numbers were measured. LLaVA-1.5's row: TextVQA 58.2 is val with OCR tokens (haotian-liu/LLaVA,
scripts/v1_5/eval/textvqa.sh), VQAv2 78.5 is test-dev, VizWiz 50.0 is test, MMBench 64.3 is dev, POPE 85.9 is the mean F1 of
three categories, SEED 66.1 is the part with images; DocVQA 28.1, InfoVQA 25.8 and MMMU 35.3 are lmms-eval's on val. LLaVA-UHD's
released scripts resize images to a long side of 1024 pixels, so both sizes occur in the paper's columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from meteor.report.data import RunResult
from meteor.report.tables import why_unscored

# Longer side in pixels to which LLaVA-UHD's scripts resize images (llava/eval/model_vqa_loader.py).
_UHD_SIDE = 1024
_SELECTION = {"k": "K = {} when answering", "visual_weight": "visual weight {} when answering"}


@dataclass(frozen=True)
class PaperColumn:
    """Evaluation behind a column of the paper.

    Attributes:
        name: heading of the column.
        benchmark: format of our question sets of this benchmark.
        title: published name of the benchmark.
        split: split whose questions count; "" if the benchmark has none.
        metric: metric of `meteor.evaluation.metrics`.
        measured: metric in words.
        ocr: published number whose prompts contain OCR tokens; "" for prompts without them.
        is_resized: whether LLaVA-UHD's released evaluation resizes the images.
    """

    name: str
    benchmark: str
    title: str
    split: str
    metric: str
    measured: str
    ocr: str = ""
    is_resized: bool = True

    def __str__(self) -> str:
        """Return the definition in words."""
        parts = [" ".join(filter(None, [self.title, self.split])), self.measured]
        return f"{self.name}: {', '.join([*parts, *['with OCR tokens in the prompt'] * bool(self.ocr)])}"


COLUMNS = (
    PaperColumn("VQA-T", "textvqa", "TextVQA", "val", "vqa_accuracy", "VQA accuracy", ocr="LLaVA-1.5's 58.2"),
    PaperColumn("VQA-D", "docvqa", "DocVQA", "val", "anls", "ANLS"),
    PaperColumn("QA-C", "chartqa", "ChartQA", "test", "relaxed_accuracy", "relaxed accuracy"),
    PaperColumn("VQA-I", "infovqa", "InfoVQA", "val", "anls", "ANLS"),
    PaperColumn("GQA", "gqa", "GQA", "testdev_balanced", "exact_match", "exact match"),
    PaperColumn("VQAv2", "vqav2", "VQAv2", "test-dev", "vqa_accuracy", "VQA accuracy"),
    PaperColumn("VizWiz", "vizwiz", "VizWiz", "test", "vqa_accuracy", "VQA accuracy"),
    PaperColumn("MMB", "mmbench", "MMBench", "dev", "circular_accuracy", "circular accuracy", is_resized=False),
    PaperColumn("MMVet", "mmvet", "MM-Vet", "", "judge", "score of a GPT-4 judge that is retired"),
    PaperColumn("MMMU", "mmmu", "MMMU", "val", "mmmu_accuracy", "accuracy"),
    PaperColumn("POPE", "pope", "POPE", "", "f1", "mean F1 of its three categories"),
    PaperColumn("SEED", "seed", "SEED-Bench", "image", "accuracy", "accuracy"),
)


@dataclass(frozen=True)
class Note:
    """Footnote of a cell.

    Attributes:
        text: words of the footnote.
        deviates: whether it says that the number does not compare with the paper's; other notes are remarks.
    """

    text: str
    deviates: bool = True


@dataclass(frozen=True)
class Cell:
    """A variant's number in a column of the paper.

    Attributes:
        question_set: name of the set that stands in the column.
        score: mean over seeds, 0 to 1; None if the answers are not scored.
        reason: why there is no score, for example "for the judge"; "" with a score.
        notes: deviations from the column's definition, then remarks.
    """

    question_set: str
    score: float | None
    reason: str
    notes: tuple[Note, ...]

    @property
    def num_deviations(self) -> int:
        return sum(note.deviates for note in self.notes)

    @property
    def is_comparable(self) -> bool:
        """Whether the number stands beside the paper's as its equal."""
        return self.score is not None and not self.num_deviations


@dataclass(frozen=True)
class Average:
    """Mean of a variant's comparable cells.

    Attributes:
        score: the mean, 0 to 1; None without a comparable cell.
        num_cells: number of comparable cells.
    """

    score: float | None
    num_cells: int

    def __str__(self) -> str:
        """Return the mean in percent; with the number of cells unless all twelve are comparable."""
        if self.score is None:
            return f"0 of {len(COLUMNS)}"
        text = f"{100 * self.score:.1f}"
        return text if self.num_cells == len(COLUMNS) else f"{text} ({self.num_cells} of {len(COLUMNS)})"


def paper_cells(runs: Sequence[RunResult]) -> dict[str, Cell]:
    """Return column -> cell of a variant, without columns whose benchmark it has not answered.

    A scored set comes before an unscored one, then the set with the fewest deviations, then the first in the run.

    Args:
        runs: results of the variant, one per seed.
    """
    found: dict[str, Cell] = {}
    for column in COLUMNS:
        tables = {name: table for run in runs for name, table in (run.scores or {}).items()}
        names = [name for name, table in tables.items() if table.get("benchmark") == column.benchmark]
        cells = [_cell(column, name, runs) for name in names]
        if cells:
            found[column.name] = min(cells, key=lambda cell: (cell.score is None, cell.num_deviations))
    return found


def paper_average(cells: Mapping[str, Cell]) -> Average:
    """Average the comparable cells of a variant; the paper's Tables 1 to 4 share this mean over twelve columns."""
    scores = [cell.score for cell in cells.values() if cell.score is not None and cell.is_comparable]
    return Average(mean(scores) if scores else None, len(scores))


def paper_numbers(run: RunResult) -> dict[str, float]:
    """Return the average and the number of comparable columns by name, for MLflow and spreadsheets; empty without a cell."""
    cells = paper_cells([run])
    average = paper_average(cells)
    if not cells:
        return {}
    found = {"paper/comparable_columns": float(average.num_cells)}
    return found if average.score is None else {"paper/average": average.score, **found}


def _cell(column: PaperColumn, name: str, runs: Sequence[RunResult]) -> Cell:
    tables = [run.scores[name] for run in runs if run.scores and name in run.scores]
    scored = [table for table in tables if table["score"] is not None]
    notes = dict.fromkeys(note for table in scored or tables for note in _notes(column, table))
    if scored and len(scored) < len(runs):
        notes[Note(f"mean over {len(scored)} of {len(runs)} seeds", deviates=False)] = None
    return Cell(
        name,
        mean(table["score"] for table in scored) if scored else None,
        "" if scored else why_unscored(tables[0]),
        tuple(sorted(notes, key=lambda note: not note.deviates)),
    )


def _notes(column: PaperColumn, table: Mapping[str, Any]) -> Iterator[Note]:
    """Yield what differs between a set's evaluation and a column's definition, and remarks."""
    if table.get("split", "") != column.split:
        yield Note(f"{column.title} {table.get('split')} instead of {column.split}")
    if table["metric"] != column.metric:
        yield Note(f"{table['metric'].replace('_', ' ')} instead of {column.metric.replace('_', ' ')}")
    if column.metric == "judge" and table["score"] is not None:
        yield Note("scored by another judge than the paper's, which is retired")
    if column.ocr:
        yield (
            Note(f"with OCR tokens in the prompt, as {column.ocr}", deviates=False)
            if table.get("ocr")
            else Note(f"no OCR tokens in the prompt, unlike {column.ocr}")
        )
    if side := table.get("long_side"):
        yield (
            Note(f"images resized to {side:,} pixels, as LLaVA-UHD's released evaluation does", deviates=False)
            if column.is_resized and side == _UHD_SIDE
            else Note(f"images resized to {side:,} pixels")
        )
    if (limit := table.get("limit")) and table["num_questions"] >= limit:
        yield Note(f"only the first {limit:,} questions")
    yield from (Note(text) for text in _selection(table.get("selection") or {}))
    if table.get("num_global_only"):
        yield Note("some questions answered by global views alone, because their prompts are too long")


def _selection(changes: Mapping[str, Any]) -> Iterator[str]:
    for name, value in changes.items():
        if name == "sub_images":
            yield "global views alone when answering" if value == "global" else "all sub-images when answering"
        else:
            yield _SELECTION[name].format(value)
