"""Differences between two variants question by question: what the same questions and images have in common cancels.

Questions about one image are not independent: intervals are clustered by image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from meteor.intervals import mean_influences, standard_error, student_interval
from meteor.report.data import VariantResult

# A question of a set; LLaVA's mixtures use an id more than once, so the question belongs to it.
Question = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """Mean score of a variant less that of its control, on the questions that both were asked.

    Attributes:
        mean: of questions, each the mean of its seeds; 1 is all right against all wrong.
        interval: 95 %, clustered by image; None where there are fewer than two images.
        by_seed: seed -> the same of one seed alone, of seeds that both have.
        num_questions, num_images: that both were asked.
    """

    mean: float
    interval: tuple[float, float] | None
    by_seed: Mapping[int | None, float]
    num_questions: int
    num_images: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(
    runs: Sequence[VariantResult], control: Sequence[VariantResult], question_set: str
) -> Difference | None:
    """Compare the seeds of a variant with those of its control; seeds of the same number are compared with each other.

    The interval is that of `meteor.intervals`, with images as clusters. It tells whether other questions would give the
    same sign; what another seed would give is seen in ``by_seed``. Answers without a score of their own, as all but the first
    rotation of a circular benchmark, are left out.

    Args:
        runs, control: results of all seeds.
        question_set: whose questions.

    Returns:
        None where no question was asked of both.
    """
    mine, theirs = _scores(runs, question_set), _scores(control, question_set)
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:  # of other seeds: each side's mean is compared
        mine, theirs, seeds = {None: _mean_of(mine)}, {None: _mean_of(theirs)}, [None]
    common = [
        question for question in mine[seeds[0]] if all(question in one[s] for one in (mine, theirs) for s in seeds)
    ]
    if not common:
        return None
    differences = {question: mean(mine[s][question] - theirs[s][question] for s in seeds) for question in common}
    drawings = _images([*runs, *control])
    clusters = {drawings[question] for question in differences}
    centre = mean(differences.values())
    error = standard_error(
        mean_influences(list(differences.values())), (drawings[question] for question in differences)
    )
    return Difference(
        mean=centre,
        interval=None if error is None else student_interval(centre, error, len(clusters)),
        by_seed={s: mean(mine[s][question] - theirs[s][question] for question in common) for s in seeds},
        num_questions=len(common),
        num_images=len(clusters),
    )


def _scores(runs: Sequence[VariantResult], question_set: str) -> dict[int | None, dict[Question, float]]:
    """Seed -> question -> score; a quarantined question is wrong for everybody and stays."""
    return {run.seed: question_scores(run.predictions, question_set) for run in runs if run.predictions}


def question_scores(rows: Sequence[Mapping[str, Any]], question_set: str) -> dict[Question, float]:
    """Question -> score, of the rows of a set that have one."""
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
    """Question -> its image; one without an image is a cluster of its own."""
    return {_question(row): row.get("image") or str(_question(row)) for run in runs for row in run.predictions or []}


def _question(row: Mapping[str, Any]) -> Question:
    return row.get("set", ""), str(row["id"]), row["question"]
