"""Differences between two variants question by question: what the same questions and pictures have in common cancels.

Questions about one picture are not independent: intervals are clustered by picture.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from scipy.stats import t as student

from meteor.report.data import VariantResult

# A question of a set; LLaVA's mixtures use an id more than once, so the question belongs to it.
Question = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """Mean score of a variant less that of its control, on the questions that both were asked.

    Attributes:
        mean: of questions, each the mean of its seeds; 1 is all right against all wrong.
        interval: 95 %, clustered by picture; None where there are fewer than two pictures.
        by_seed: seed -> the same of one seed alone, of seeds that both have.
        num_questions, num_pictures: that both were asked.
    """

    mean: float
    interval: tuple[float, float] | None
    by_seed: Mapping[int | None, float]
    num_questions: int
    num_pictures: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(
    runs: Sequence[VariantResult], control: Sequence[VariantResult], question_set: str
) -> Difference | None:
    """Compare the seeds of a variant with those of its control; seeds of the same number are compared with each other.

    The standard error of the mean over n questions is that of a ratio estimator with pictures as clusters,
    sqrt(G / (G - 1) sum_g (sum_{i in g} (d_i - mean))^2) / n, with Student's quantile of G - 1 degrees of freedom (clustered
    errors and paired differences as in Miller, "Adding Error Bars to Evals", arXiv 2411.00640). It tells whether other
    questions would give the same sign; what another seed would give is seen in ``by_seed``.

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
    pictures = _pictures([*runs, *control])
    clusters: dict[str, list[float]] = defaultdict(list)
    for question, difference in differences.items():
        clusters[pictures[question]].append(difference)
    centre = mean(differences.values())
    return Difference(
        mean=centre,
        interval=clustered_interval(list(clusters.values()), centre),
        by_seed={s: mean(mine[s][question] - theirs[s][question] for question in common) for s in seeds},
        num_questions=len(common),
        num_pictures=len(clusters),
    )


def clustered_interval(clusters: Sequence[Sequence[float]], centre: float) -> tuple[float, float] | None:
    """95 % interval of the mean of values that come in clusters; None for fewer than two; see `paired_difference`."""
    num_clusters, num_values = len(clusters), sum(map(len, clusters))
    if num_clusters < 2:
        return None
    squares = sum(sum(value - centre for value in cluster) ** 2 for cluster in clusters)
    error = math.sqrt(num_clusters / (num_clusters - 1) * squares) / num_values
    reach = float(student.ppf(0.975, num_clusters - 1)) * error
    return centre - reach, centre + reach


def _scores(runs: Sequence[VariantResult], question_set: str) -> dict[int | None, dict[Question, float]]:
    """Seed -> question -> score; a quarantined question is wrong for everybody and stays."""
    return {
        run.seed: {_question(row): float(row["score"]) for row in run.predictions if row.get("set", "") == question_set}
        for run in runs
        if run.predictions
    }


def _mean_of(seeds: Mapping[int | None, Mapping[Question, float]]) -> dict[Question, float]:
    tables = list(seeds.values())
    common = [question for question in tables[0] if all(question in table for table in tables)] if tables else []
    return {question: mean(table[question] for table in tables) for question in common}


def _pictures(runs: Sequence[VariantResult]) -> dict[Question, str]:
    """Question -> its picture; one without a picture is a cluster of its own."""
    return {_question(row): row.get("image") or str(_question(row)) for run in runs for row in run.predictions or []}


def _question(row: Mapping[str, Any]) -> Question:
    return row.get("set", ""), str(row["id"]), row["question"]
