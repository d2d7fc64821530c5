"""What a report is made of: plain values, and how one stage's run is read back from its folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from meteor import storage
from meteor.errors import DataError
from meteor.image.slicing import SlicePlan

# Order in which stages run and are shown. The feature cache is shared by all variants and reported apart.
TRAINING_STAGES = ("pretrain", "finetune")
EVALUATION_STAGE = "evaluate"

_SEGMENT_NAME = re.compile(r"/from_(\d+)\.jsonl$")


@dataclass(frozen=True)
class StageRun:
    """One run of one stage.

    Attributes:
        stage: "pretrain", "finetune" or "evaluate".
        uri: the run's folder.
        settings: resolved settings, nested.
        summary: what ``summary.json`` holds; None while the run has not finished.
        metrics: one row a reported step, in order. Its counts and ``seconds`` are those since the previous row.
        identity: the rest of ``run.json``: name, digest, parent, and whatever else was recorded (index digest, cache
            key, git commit, ``versions``).
    """

    stage: str
    uri: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    metrics: list[dict[str, Any]]
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary is not None


@dataclass(frozen=True)
class VariantResult:
    """All that is known of one variant.

    Attributes:
        name: unique among the variants of a report.
        stages: stage name -> its run; a stage that was not run is absent.
        scores: question set -> the table of `meteor.evaluation.scoring.score_table`; None if not evaluated.
        predictions: rows with ``id``, ``question``, ``prediction``, ``answer``, ``score`` (0 ... 1), ``quarantined``,
            and ``image`` (its name), ``type`` and ``set`` where there is one; None if not evaluated.
        num_projector_parameters: of the projector alone.
        num_visual_tokens_per_image: measured mean, separators not counted.
        variant: what all seeds of a study's variant share; ``name`` where there is one seed.
        seed: None where none was named.
        efficiency: fields of `meteor.evaluation.efficiency.Efficiency`; None if not measured.
        encoder_shares: training stage -> share of its arithmetic that encoding in the step would be.
    """

    name: str
    stages: Mapping[str, StageRun]
    scores: Mapping[str, Mapping[str, Any]] | None = None
    predictions: list[dict[str, Any]] | None = None
    num_projector_parameters: int | None = None
    num_visual_tokens_per_image: float | None = None
    variant: str = ""
    seed: int | None = None
    efficiency: Mapping[str, Any] | None = None
    encoder_shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.variant or self.name


@dataclass(frozen=True)
class StudyTable:
    """A table that a study asks for.

    Attributes:
        title: its heading.
        variants: rows, in this order.
        control: the variant that differences are taken from.
        paper: number of the paper's table whose rows stand beside; None for none.
    """

    title: str
    variants: tuple[str, ...]
    control: str
    paper: int | None = None


@dataclass(frozen=True, eq=False)
class SubImageScores:
    """Scores of the P patches of one sub-image, row-major, and the K kept ones; a score the projector lacks is None."""

    combined_scores: np.ndarray
    kept_indices: np.ndarray
    visual_scores: np.ndarray | None = None
    native_scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SelectionPanel:
    """One picture, one question, and which of the picture's patches a variant kept.

    Attributes:
        image: RGB.
        sub_images: one for each of the plan, the global view first.

    Raises:
        DataError: sub-images or scores do not fit the plan.
    """

    title: str
    question: str
    answer: str
    prediction: str
    image: Image.Image
    plan: SlicePlan
    sub_images: tuple[SubImageScores, ...]
    variant: str = ""

    def __post_init__(self) -> None:
        shapes = [(scores.combined_scores.shape) for scores in self.sub_images]
        expected = [(rows * columns,) for rows, columns in self.plan.patch_grids]
        if shapes != expected:
            raise DataError(
                f"panel {self.title!r}: scores have shapes {shapes}, the slice plan's patch grids ask for {expected}; "
                "give one score vector for each sub-image, the global view first"
            )


@dataclass(frozen=True, eq=False)
class ImportancePanel:
    """How much a question's words look at each patch of a picture's global view, layer by layer.

    Attributes:
        title: the picture's name.
        image: RGB.
        grid: (Hu, Wu) of the global view.
        patches: (K,) those with a token.
        scores: (layers, K).
        layer: the one that decides what is dropped, from 0.
    """

    variant: str
    title: str
    question: str
    image: Image.Image
    grid: tuple[int, int]
    patches: np.ndarray
    scores: np.ndarray
    layer: int


def read_stage_run(uri: str) -> StageRun:
    """Read ``run.json``, ``summary.json`` if there, and ``metrics/*.jsonl`` of a run's folder (local or S3).

    Raises:
        NotFoundError: the folder holds no ``run.json``.
        DataError: a metrics file holds a line that is not JSON.
    """
    identity: dict[str, Any] = dict(storage.read_json(storage.join(uri, "run.json")))
    summary_uri = storage.join(uri, "summary.json")
    return StageRun(
        stage=identity.pop("stage"),
        uri=uri,
        settings=identity.pop("settings"),
        summary=storage.read_json(summary_uri) if storage.exists(summary_uri) else None,
        metrics=_read_metrics(storage.join(uri, "metrics")),
        identity=identity,
    )


def _read_metrics(uri: str) -> list[dict[str, Any]]:
    """Rows of all segments in order; a segment named by step s replaces what earlier ones did after s and lost."""
    segments = []
    for info in storage.list_objects(uri):
        if match := _SEGMENT_NAME.search(info.uri):
            segments.append((int(match.group(1)), info.uri))
    rows: list[dict[str, Any]] = []
    for start, segment_uri in sorted(segments):
        rows = [row for row in rows if row["step"] <= start] + _read_rows(segment_uri)
    return rows


def _read_rows(uri: str) -> list[dict[str, Any]]:
    # What follows the last newline was being written when the process died: it is no row yet.
    lines = storage.read_bytes(uri).decode("utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{uri}, line {number} is not JSON ({error}): {line[:80]!r}; remove the line") from error
    return rows
