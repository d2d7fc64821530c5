"""Values that a report is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from meteor.errors import DataError
from meteor.image.slicing import SlicePlan
from meteor.runs.reading import StageRecord


@dataclass(frozen=True)
class RunResult:
    """Results of one variant, or of one seed of a variant.

    Attributes:
        name: name, unique among the results of a report.
        stages: stage name -> record of the stage; stages that were not run are absent.
        scores: question set -> table of `meteor.evaluation.scoring.score_table`; None if not evaluated.
        predictions: rows with ``id``, ``question``, ``prediction``, ``answer``, ``score`` (0 to 1), ``quarantined``, and,
            if the question has them, ``image`` (a name), ``type`` and ``set``; None if not evaluated.
        num_projector_parameters: parameters of the projector alone; None if not recorded.
        num_visual_tokens_per_image: measured mean, separators not counted; None if not recorded.
        variant: name of the variant, which all its seeds share; "" if the variant is ``name``.
        seed: seed of the run; None if the study names no seeds.
        efficiency: fields of `meteor.evaluation.efficiency.Efficiency`; None if not measured.
        encoder_shares: training stage -> share of a step's arithmetic that encoding in the step would be, 0 to 1.
        encoding_s: seconds of all encoders together for filling the run's cache; None if not recorded.
        encoder_flops: training stage -> FLOPs of encoding its images in its steps, over all epochs.
    """

    name: str
    stages: Mapping[str, StageRecord]
    scores: Mapping[str, Mapping[str, Any]] | None = None
    predictions: list[dict[str, Any]] | None = None
    num_projector_parameters: int | None = None
    num_visual_tokens_per_image: float | None = None
    variant: str = ""
    seed: int | None = None
    efficiency: Mapping[str, Any] | None = None
    encoder_shares: Mapping[str, float] = field(default_factory=dict)
    encoder_flops: Mapping[str, float] = field(default_factory=dict)
    encoding_s: float | None = None

    def answered_k(self, question_set: str) -> int | None:
        """Return the number of visual tokens per sub-image that the evaluation chose for a set; None for that of training."""
        options = self.stages["evaluate"].settings.get("evaluate") or {}
        return (options.get("sets", {}).get(question_set) or {}).get("k") or options.get("k")

    @property
    def group(self) -> str:
        """Name under which the seeds of a variant come together."""
        return self.variant or self.name


@dataclass(frozen=True)
class StudyTable:
    """A table that the settings of a study define.

    Attributes:
        title: heading of the table.
        variants: names of the variants, one per row.
        control: variant that differences are taken from.
        paper: number of the paper's table to compare with; None for no comparison.
        losses: whether to compare the loss of each step with the control's.
    """

    title: str
    variants: tuple[str, ...]
    control: str
    paper: int | None = None
    losses: bool = False


@dataclass(frozen=True, eq=False)
class SubImageScores:
    """Scores of the patches of one sub-image.

    Attributes:
        combined_scores: (P,) float, row-major; the scores that the selection goes by.
        kept_indices: (K,) int, positions of the kept patches.
        visual_scores, native_scores: (P,) float, scores of each expert; None if the projector lacks the expert.
    """

    combined_scores: np.ndarray
    kept_indices: np.ndarray
    visual_scores: np.ndarray | None = None
    native_scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SelectionPanel:
    """An image with a question, and the patches of the image that a variant kept.

    Attributes:
        title: heading.
        question: text of the question.
        answer: right answer.
        prediction: answer of the variant.
        image: the image, RGB.
        plan: slices of the image.
        sub_images: scores per sub-image of the plan, the global view first.
        variant: name of the variant; "" if the report has only one.

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
                f"panel {self.title!r}: scores have shapes {shapes}, but the slice plan's patch grids need {expected}; "
                "give one score vector per sub-image, the global view first"
            )
