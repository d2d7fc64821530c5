"""Differences between two variants, question by question, so that the difficulty of questions and images cancels out.

Questions about one image are not independent, so that intervals are clustered by image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from meteor.intervals import mean_influences, standard_error, student_interval
from meteor.report.data import VariantResult

# (question set, id, text of the question): LLaVA's mixtures use an id for several questions.
Question = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """Mean score of a variant minus the mean score of its control, on the questions that both answered.

    Attributes:
        mean: mean over questions, of which each is a mean over seeds, -1 to 1.
        interval: 95 % interval, clustered by image; None with fewer than two images.
        by_seed: seed -> mean over questions for this seed alone, for seeds that both have.
        num_questions, num_images: questions that both answered, and the images of these questions.
    """

    mean: float
    interval: tuple[float, float] | None
    by_seed: Mapping[int | None, float]
    num_questions: int
    num_images: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(
    runs: Sequence[VariantResult], control: Sequence[VariantResult], question_set: str
) -> Difference | None:
    """Compare a variant with its control; equal seeds are compared with each other.

    The interval comes from `meteor.intervals`, with images as clusters. It says whether other questions would give the same
    sign, and ``by_seed`` shows how much seeds matter. Answers without a score are skipped; in a circular benchmark only the
    first rotation has a score.

    Args:
        runs, control: results of all seeds of the variant, and of the control.
        question_set: name of the question set to compare.

    Returns:
        The difference; None if both have no scored question in common.
    """
    mine, theirs = _scores(runs, question_set), _scores(control, question_set)
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:  # variant and control have no seed in common: their means over seeds are compared
        mine, theirs, seeds = {None: _mean_of(mine)}, {None: _mean_of(theirs)}, [None]
    common = [
        question for question in mine[seeds[0]] if all(question in side[s] for side in (mine, theirs) for s in seeds)
    ]
    if not common:
        return None
    differences = {question: mean(mine[s][question] - theirs[s][question] for s in seeds) for question in common}
    image_of = _images([*runs, *control])
    clusters = {image_of[question] for question in differences}
    centre = mean(differences.values())
    error = standard_error(
        mean_influences(list(differences.values())), (image_of[question] for question in differences)
    )
    return Difference(
        mean=centre,
        interval=None if error is None else student_interval(centre, error, len(clusters)),
        by_seed={s: mean(mine[s][question] - theirs[s][question] for question in common) for s in seeds},
        num_questions=len(common),
        num_images=len(clusters),
    )


def _scores(runs: Sequence[VariantResult], question_set: str) -> dict[int | None, dict[Question, float]]:
    """Return seed -> question -> score; a question whose image is quarantined counts, as wrong for every variant."""
    return {run.seed: question_scores(run.predictions, question_set) for run in runs if run.predictions}


def question_scores(rows: Sequence[Mapping[str, Any]], question_set: str) -> dict[Question, float]:
    """Return question -> score, for the rows of a set that have a score."""
    return {
        _question(row): float(row["score"])
        for row in rows
        if row.get("set", "") == question_set and row["score"] is not None
    }


def _mean_of(seeds: Mapping[int | None, Mapping[Question, float]]) -> dict[Question, float]:
    tables = list(seeds.values())
    common = [question for question in tables[0] if all(question in table for table in tables)] if tables else []
    return {question: mean(table[question] for table in tables) for question in common}


def _images(runs: Sequence[VariantResult]) -> dict[Question, str]:
    """Return question -> image name; a question without an image is a cluster of its own."""
    return {_question(row): row.get("image") or str(_question(row)) for run in runs for row in run.predictions or []}


def _question(row: Mapping[str, Any]) -> Question:
    return row.get("set", ""), str(row["id"]), row["question"]
