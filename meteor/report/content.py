"""Everything a page shows, in the order it is shown; both templates lay out the same content."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from meteor.report import paper
from meteor.report.canvas import Look, Picture, variant_looks
from meteor.report.data import TRAINING_STAGES, SelectionPanel, VariantResult
from meteor.report.figures import comparable_runs, loss_figure, scores_figure, throughput_figure
from meteor.report.pictures import heat_figure, kept_figure
from meteor.report.predictions import PredictionRow, choose_predictions
from meteor.report.provenance import Provenance, SettingsBlock, missing_pieces, provenance, settings_blocks
from meteor.report.tables import (
    Table,
    cache_table,
    difference_table,
    headline_table,
    question_sets,
    score_table,
    stage_table,
)

# Pixels of a thumbnail's longer side: twice its size on the page.
_THUMBNAIL_PIXELS = 192


@dataclass(frozen=True)
class StageSection:
    stage: str
    table: Table
    loss: Picture | None


@dataclass(frozen=True)
class ScoreSection:
    """``num_quarantined``: questions that count as wrong because their picture could not be used."""

    question_set: str
    table: Table
    figure: Picture
    num_quarantined: int


@dataclass(frozen=True)
class SelectionSection:
    panel: SelectionPanel
    kept: Picture
    heat: Picture


@dataclass(frozen=True)
class AnswerRow:
    row: PredictionRow
    thumbnail: Picture | None


@dataclass(frozen=True)
class ReportContent:
    title: str
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    variant_names: tuple[str, ...]
    headline: Table
    differences: Table | None
    cache: Table | None
    stages: tuple[StageSection, ...]
    throughput: Picture | None
    scores: tuple[ScoreSection, ...]
    selections: tuple[SelectionSection, ...]
    answers: tuple[AnswerRow, ...]
    paper_tables: tuple[Table, ...]
    paper_remarks: tuple[str, ...]
    provenance: Provenance
    settings: tuple[SettingsBlock, ...]

    def pictures(self) -> Iterator[Picture]:
        """Every figure once."""
        found = [section.loss for section in self.stages] + [self.throughput]
        found += [section.figure for section in self.scores]
        found += [picture for section in self.selections for picture in (section.kept, section.heat)]
        found += list({answer.row.image: answer.thumbnail for answer in self.answers}.values())
        return (picture for picture in found if picture is not None)


def build_content(
    title: str,
    variants: Sequence[VariantResult],
    panels: Sequence[SelectionPanel],
    cache: Mapping[str, Any] | None,
    notes: Sequence[str],
    thumbnails: Mapping[str, Image.Image],
) -> ReportContent:
    """Compute every table and draw every figure; arguments as in `meteor.report.page.write_report`."""
    looks = variant_looks([variant.name for variant in variants])
    runs_by_stage = {stage: comparable_runs(variants, stage) for stage in TRAINING_STAGES}
    reported = {stage: runs for stage, runs in runs_by_stage.items() if runs}
    return ReportContent(
        title=title,
        notes=tuple(notes),
        missing=tuple(missing_pieces(variants, cache)),
        variant_names=tuple(looks),
        headline=headline_table(variants),
        differences=difference_table(variants),
        cache=None if cache is None else cache_table(cache),
        stages=tuple(
            StageSection(
                stage,
                stage_table(variants, stage),
                loss_figure(stage, reported[stage], looks) if stage in reported else None,
            )
            for stage in TRAINING_STAGES
        ),
        throughput=throughput_figure(reported, looks) if reported else None,
        scores=_score_sections(variants, looks),
        selections=tuple(
            SelectionSection(panel, kept_figure(panel, f"kept_{index:02d}"), heat_figure(panel, f"heat_{index:02d}"))
            for index, panel in enumerate(panels, start=1)
        ),
        answers=_answer_rows(variants, thumbnails),
        paper_tables=(paper.efficiency_table(variants), paper.benchmark_table(variants)),
        paper_remarks=paper.REMARKS,
        provenance=provenance(variants),
        settings=tuple(settings_blocks(variants)),
    )


def _score_sections(variants: Sequence[VariantResult], looks: Mapping[str, Look]) -> tuple[ScoreSection, ...]:
    sections = []
    for index, name in enumerate(question_sets(variants), start=1):
        scores = {v.name: v.scores[name] for v in variants if v.scores is not None and name in v.scores}
        sections.append(
            ScoreSection(
                question_set=name,
                table=score_table(variants, name),
                figure=scores_figure(f"scores_{index:02d}", scores, looks),
                num_quarantined=max(table["num_quarantined"] for table in scores.values()),
            )
        )
    return tuple(sections)


def _answer_rows(variants: Sequence[VariantResult], thumbnails: Mapping[str, Image.Image]) -> tuple[AnswerRow, ...]:
    rows = choose_predictions(variants)
    names = dict.fromkeys(row.image for row in rows if row.image in thumbnails)
    drawn = {name: _thumbnail(thumbnails[name], f"thumbnail_{index:02d}") for index, name in enumerate(names, start=1)}
    return tuple(AnswerRow(row, drawn.get(row.image)) for row in rows)


def _thumbnail(image: Image.Image, name: str) -> Picture:
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    width, height = max(small.width // 2, 1), max(small.height // 2, 1)
    return Picture(name, buffer.getvalue(), width, height, alt="the question's picture", caption="")
