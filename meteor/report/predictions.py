"""Which of thousands of answers a page shows: a few that all variants got right, some got right, none got right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.report.data import VariantResult


@dataclass(frozen=True)
class PredictionRow:
    """One question with every variant's answer.

    Attributes:
        image: name of its image, "" if none.
        answers: variant -> (prediction, score 0 ... 1); a variant that was not asked is absent.
    """

    question: str
    answer: str
    type: str
    image: str
    answers: Mapping[str, tuple[str, float]]


def choose_predictions(variants: Sequence[VariantResult], num_rows: int = 9) -> list[PredictionRow]:
    """Pick rows evenly from those all variants, some, and none got right; the same rows every time.

    Questions about a quarantined image were not answered and are left out.
    Call it before `write_report` to learn which images are worth loading as thumbnails.
    """
    rows = _join_by_question(variants)
    groups: list[list[PredictionRow]] = [[], [], []]
    for row in rows:
        num_right = sum(score == 1.0 for _, score in row.answers.values())
        groups[0 if num_right == len(row.answers) else 2 if num_right == 0 else 1].append(row)
    return [row for group, num in zip(groups, _shares(groups, num_rows), strict=True) for row in _spread(group, num)]


def _join_by_question(variants: Sequence[VariantResult]) -> list[PredictionRow]:
    # The question belongs to the key: LLaVA's mixtures use an id more than once.
    asked: dict[tuple[str, str, str], dict[str, Any]] = {}
    answers: dict[tuple[str, str, str], dict[str, tuple[str, float]]] = {}
    for variant in variants:
        for row in variant.predictions or []:
            if row["quarantined"] or row["score"] is None:
                continue
            key = (row.get("set", ""), str(row["id"]), row["question"])
            asked.setdefault(key, row)
            answers.setdefault(key, {})[variant.name] = (row["prediction"], float(row["score"]))
    return [
        PredictionRow(
            question=row["question"],
            answer=row["answer"],
            type=row.get("type", ""),
            image=row.get("image", ""),
            answers=answers[key],
        )
        for key, row in asked.items()
    ]


def _shares(groups: Sequence[Sequence[PredictionRow]], num_rows: int) -> list[int]:
    """How many to take of each group: one after the other in turn, until enough or all are taken."""
    shares = [0] * len(groups)
    while sum(shares) < min(num_rows, sum(map(len, groups))):
        for index, group in enumerate(groups):
            if shares[index] < len(group) and sum(shares) < num_rows:
                shares[index] += 1
    return shares


def _spread(rows: Sequence[PredictionRow], num: int) -> list[PredictionRow]:
    return [rows[index * len(rows) // num] for index in range(num)]
