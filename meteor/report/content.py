"""Content of a report in the order of the page; the templates for Markdown and HTML lay it out."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from meteor.report import paper
from meteor.report.canvas import MANY_VARIANTS, Drawing, Look, variant_looks
from meteor.report.cost import answer_flops_table, answer_parts, answer_time_table, training_cost_table
from meteor.report.count_figures import count_figure
from meteor.report.csv_files import csv_files
from meteor.report.data import RunResult, SelectionPanel, StudyTable
from meteor.report.figures import comparable_runs, curves, loss_figure, scores_figure, throughput_figure
from meteor.report.losses import losses_table
from meteor.report.predictions import PredictionRow, choose_predictions
from meteor.report.provenance import (
    Provenance,
    SettingsBlock,
    missing_pieces,
    projector_notes,
    provenance,
    settings_blocks,
)
from meteor.report.seeds import merge_seeds
from meteor.report.selection_figures import heat_figure, kept_figure
from meteor.report.study import results_table
from meteor.report.study_figures import kept_by_variants_figure, pareto_figure
from meteor.report.tables import (
    Table,
    cache_table,
    difference_table,
    headline_table,
    question_sets,
    score_facts,
    score_table,
    stage_table,
)
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES

# Pixels of a thumbnail's longer side, twice its size on the page for dense screens.
_THUMBNAIL_PIXELS = 192


@dataclass(frozen=True)
class StageSection:
    """A training stage of all variants."""

    stage: str
    table: Table
    loss: Drawing | None


@dataclass(frozen=True)
class ScoreSection:
    """Scores of all variants on one question set.

    Attributes:
        question_set: name of the set.
        facts: everything that the scores depend on, in sentences.
        table: scores by type of question.
        figure: chart of the scores; None if nothing could be scored.
        num_quarantined: questions that count as wrong because their record or image could not be used.
        num_global_only: questions that were answered from global views alone, because their prompts were too long.
    """

    question_set: str
    facts: tuple[str, ...]
    table: Table
    figure: Drawing | None
    num_quarantined: int
    num_global_only: int


@dataclass(frozen=True)
class SelectionSection:
    """Kept patches and scores of one image."""

    panel: SelectionPanel
    kept: Drawing
    heat: Drawing


@dataclass(frozen=True)
class AnswerRow:
    """Answers of all variants to one question, with a thumbnail of the question's image."""

    row: PredictionRow
    thumbnail: Drawing | None


@dataclass(frozen=True)
class TableSection:
    """A table of a study.

    Attributes:
        title: heading of the table.
        control: variant that differences are taken from.
        results: scores and differences.
        losses: losses of each step compared with the control's; None if the table does not ask for them.
        beside: the results in the layout of a table of the paper, below the paper's rows; None if no table is chosen.
    """

    title: str
    control: str
    results: Table
    losses: Table | None
    beside: Table | None


@dataclass(frozen=True)
class StudySection:
    """Parts of a study's report that a report of single runs lacks."""

    tables: tuple[TableSection, ...]
    pareto: Drawing | None
    counts: Drawing | None
    answer_times: Table
    answer_flops: Table
    training_costs: Table
    hardware: str
    answer_lengths: str
    kept: tuple[Drawing, ...]
    csv_files: Mapping[str, str]


@dataclass(frozen=True)
class ReportContent:
    """Content of a report; None and empty tuples stand for parts that the runs lack."""

    title: str
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    variant_names: tuple[str, ...]
    answered_by: tuple[str, ...]
    headline: Table
    differences: Table | None
    cache: Table | None
    stages: tuple[StageSection, ...]
    throughput: Drawing | None
    scores: tuple[ScoreSection, ...]
    selections: tuple[SelectionSection, ...]
    answers: tuple[AnswerRow, ...]
    paper_tables: tuple[Table, ...]
    paper_remarks: tuple[str, ...]
    provenance: Provenance
    settings: tuple[SettingsBlock, ...]
    study: StudySection | None

    def drawings(self) -> Iterator[Drawing]:
        """Return every figure once."""
        found = [section.loss for section in self.stages] + [self.throughput]
        found += [section.figure for section in self.scores if section.figure is not None]
        found += [drawing for section in self.selections for drawing in (section.kept, section.heat)]
        if self.study is not None:
            found += [self.study.pareto, self.study.counts, *self.study.kept]
        found += list({answer.row.image: answer.thumbnail for answer in self.answers}.values())
        return (drawing for drawing in found if drawing is not None)


def build_content(
    title: str,
    variants: Sequence[RunResult],
    panels: Sequence[SelectionPanel],
    cache: Mapping[str, Any] | None,
    notes: Sequence[str],
    thumbnails: Mapping[str, Image.Image],
    tables: Sequence[StudyTable] = (),
) -> ReportContent:
    """Compute every table and draw every figure; for the arguments see `meteor.report.page.write_report`."""
    runs, variants = variants, merge_seeds(variants)
    looks = variant_looks([variant.name for variant in variants])
    runs_by_stage: dict[str, dict[str, StageRecord]] = {
        stage: comparable_runs(variants, stage) for stage in TRAINING_STAGES
    }
    reported = {stage: by_name for stage, by_name in runs_by_stage.items() if by_name}
    return ReportContent(
        title=title,
        notes=(*notes, *projector_notes(variants)),
        missing=tuple(missing_pieces(runs, cache)),
        variant_names=tuple(looks),
        answered_by=tuple(looks)[:MANY_VARIANTS],
        headline=headline_table(variants),
        differences=difference_table(variants),
        cache=None if cache is None else cache_table(cache),
        stages=tuple(
            StageSection(
                stage,
                stage_table(variants, stage),
                _loss_figure(stage, runs, looks) if stage in reported else None,
            )
            for stage in TRAINING_STAGES
        ),
        throughput=throughput_figure(reported, looks) if reported else None,
        scores=_score_sections(variants, looks),
        selections=() if tables else _selections(panels),
        answers=_answer_rows(variants, thumbnails),
        paper_tables=() if tables else (paper.paper_table(4, runs), paper.paper_table(1, runs)),
        paper_remarks=paper.REMARKS,
        provenance=provenance(runs),
        settings=tuple(settings_blocks(runs)),
        study=_study_section(runs, panels, tables, looks) if tables else None,
    )


def _study_section(
    runs: Sequence[RunResult],
    panels: Sequence[SelectionPanel],
    tables: Sequence[StudyTable],
    looks: Mapping[str, Look],
) -> StudySection:
    measured = [run.efficiency for run in runs if run.efficiency]
    lengths = [f"{efficiency['num_new_tokens']:g}" for efficiency in measured if answer_parts(efficiency)]
    panels_of: dict[str, list[SelectionPanel]] = {}
    for panel in panels:
        panels_of.setdefault(panel.title, []).append(panel)
    return StudySection(
        tables=tuple(_table_section(spec, runs) for spec in tables),
        pareto=pareto_figure(runs, looks),
        counts=count_figure(merge_seeds(runs)),
        answer_times=answer_time_table(runs),
        answer_flops=answer_flops_table(runs),
        training_costs=training_cost_table(runs),
        hardware="; ".join(dict.fromkeys(efficiency["hardware"] for efficiency in measured)),
        answer_lengths=" or ".join(dict.fromkeys(lengths)),
        kept=tuple(
            kept_by_variants_figure(of_image[:MANY_VARIANTS], f"kept_{index:02d}")
            for index, of_image in enumerate(panels_of.values(), start=1)
        ),
        csv_files=csv_files(runs, tables),
    )


def _table_section(spec: StudyTable, runs: Sequence[RunResult]) -> TableSection:
    mine = [run for name in spec.variants for run in runs if run.group == name]
    beside = None if spec.paper is None else paper.paper_table(spec.paper, mine)
    losses = losses_table(spec, mine) if spec.losses else None
    return TableSection(spec.title, spec.control, results_table(spec, mine), losses, beside)


def _loss_figure(stage: str, runs: Sequence[RunResult], looks: Mapping[str, Look]) -> Drawing:
    found = curves(runs, stage)
    return loss_figure(stage, found, {label: looks[label.split(", ")[0]] for label in found})


def _selections(panels: Sequence[SelectionPanel]) -> tuple[SelectionSection, ...]:
    return tuple(
        SelectionSection(panel, kept_figure(panel, f"kept_{index:02d}"), heat_figure(panel, f"heat_{index:02d}"))
        for index, panel in enumerate(panels, start=1)
    )


def _score_sections(variants: Sequence[RunResult], looks: Mapping[str, Look]) -> tuple[ScoreSection, ...]:
    sections = []
    for index, name in enumerate(question_sets(variants), start=1):
        scores = {v.name: v.scores[name] for v in variants if v.scores is not None and name in v.scores}
        sections.append(
            ScoreSection(
                question_set=name,
                facts=tuple(score_facts(scores)),
                table=score_table(variants, name),
                figure=scores_figure(f"scores_{index:02d}", scores, looks)
                if any(table["score"] is not None for table in scores.values())
                else None,
                num_quarantined=max(table["num_quarantined"] for table in scores.values()),
                num_global_only=max(table.get("num_global_only", 0) for table in scores.values()),
            )
        )
    return tuple(sections)


def _answer_rows(variants: Sequence[RunResult], thumbnails: Mapping[str, Image.Image]) -> tuple[AnswerRow, ...]:
    rows = choose_predictions(variants)
    names = dict.fromkeys(row.image for row in rows if row.image in thumbnails)
    drawn = {name: _thumbnail(thumbnails[name], f"thumbnail_{index:02d}") for index, name in enumerate(names, start=1)}
    return tuple(AnswerRow(row, drawn.get(row.image)) for row in rows)


def _thumbnail(image: Image.Image, name: str) -> Drawing:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    width, height = max(small.width // 2, 1), max(small.height // 2, 1)
    return Drawing(name, buffer.getvalue(), width, height, alt="the question's image", caption="")
