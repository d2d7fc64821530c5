"""What a report is made of: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from meteor.errors import DataError
from meteor.image.slicing import SlicePlan
from meteor.runs.reading import StageRecord


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
    stages: Mapping[str, StageRecord]
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
    """One image, one question, and which of the image's patches a variant kept.

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
