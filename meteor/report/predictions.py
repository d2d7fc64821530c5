"""Choice of the few answers that a page shows: questions that all variants, some, and none got right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.report.data import VariantResult


@dataclass(frozen=True)
class PredictionRow:
    """A question with the answers of all variants.

    Attributes:
        question: text of the question.
        answer: right answer.
        type: type of the question; "" if it has none.
        image: name of the question's image; "" if it has none.
        answers: variant -> (prediction, score 0 to 1); variants that did not answer the question are absent.
    """

    question: str
    answer: str
    type: str
    image: str
    answers: Mapping[str, tuple[str, float]]


def choose_predictions(variants: Sequence[VariantResult], num_rows: int = 9) -> list[PredictionRow]:
    """Choose questions evenly from those that all variants, some, and none got right.

    The choice is the same every time, so that a caller of `write_report` can find out before which thumbnails it needs.
    Questions about a quarantined image were not answered, and are never chosen.
    """
    rows = _join_by_question(variants)
    groups: list[list[PredictionRow]] = [[], [], []]
    for row in rows:
        num_right = sum(score == 1.0 for _, score in row.answers.values())
        groups[0 if num_right == len(row.answers) else 2 if num_right == 0 else 1].append(row)
    return [row for group, num in zip(groups, _shares(groups, num_rows), strict=True) for row in _spread(group, num)]


def _join_by_question(variants: Sequence[VariantResult]) -> list[PredictionRow]:
    # The question belongs to the key, as LLaVA's mixtures use an id for several questions.
    questions: dict[tuple[str, str, str], dict[str, Any]] = {}
    answers: dict[tuple[str, str, str], dict[str, tuple[str, float]]] = {}
    for variant in variants:
        for row in variant.predictions or []:
            if row["quarantined"] or row["score"] is None:
                continue
            key = (row.get("set", ""), str(row["id"]), row["question"])
            questions.setdefault(key, row)
            answers.setdefault(key, {})[variant.name] = (row["prediction"], float(row["score"]))
    return [
        PredictionRow(
            question=row["question"],
            answer=row["answer"],
            type=row.get("type", ""),
            image=row.get("image", ""),
            answers=answers[key],
        )
        for key, row in questions.items()
    ]


def _shares(groups: Sequence[Sequence[PredictionRow]], num_rows: int) -> list[int]:
    """Return how many rows to choose from each group: groups take turns until there are enough rows, or no more."""
    shares = [0] * len(groups)
    while sum(shares) < min(num_rows, sum(map(len, groups))):
        for index, group in enumerate(groups):
            if shares[index] < len(group) and sum(shares) < num_rows:
                shares[index] += 1
    return shares


def _spread(rows: Sequence[PredictionRow], num: int) -> list[PredictionRow]:
    return [rows[index * len(rows) // num] for index in range(num)]
