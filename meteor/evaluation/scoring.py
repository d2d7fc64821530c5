"""Scores of answers: one function a metric, and the table over a benchmark with 95 % intervals; needs no model."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from meteor.errors import DataError

UNTYPED = "untyped"
# Two-sided 95 % quantile of the standard normal distribution.
_Z_95 = 1.959963984540054


def normalise_answer(text: str) -> str:
    """Lower case, white space collapsed, trailing "." removed: LLaVA's rule for GQA's short answers."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are equal after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(answer))


def score_row(row: Mapping[str, Any]) -> float:
    """Exact match of one row with ``prediction``, ``answer`` and ``quarantined``; 0.0 if its picture is quarantined."""
    return 0.0 if row["quarantined"] else exact_match(row["prediction"], row["answer"])


def wilson_interval(num_right: int, num_questions: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927): unlike the normal one it stays in [0, 1] at both ends.

    Raises:
        ValueError: unless 0 <= num_right <= num_questions and num_questions > 0.
    """
    if not 0 <= num_right <= num_questions or num_questions == 0:
        raise ValueError(
            f"{num_right} right of {num_questions} questions is not a share; need 0 <= right <= questions > 0"
        )
    share = num_right / num_questions
    squared = _Z_95**2 / num_questions
    centre = (share + squared / 2) / (1 + squared)
    half_width = _Z_95 * math.sqrt(share * (1 - share) / num_questions + squared / (4 * num_questions)) / (1 + squared)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def score_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact match over all questions and for each type of question.

    Args:
        rows: each with ``prediction`` (str), ``answer`` (str), ``type`` (str, "" if none) and ``quarantined`` (bool).
            A question whose picture is quarantined counts as wrong, and is counted apart.

    Returns:
        ``exact_match``, ``interval`` [low, high] (Wilson, 95 %), ``num_questions``, ``majority_share`` (what always
        giving the most frequent answer would score), ``num_quarantined``, and ``by_type``: the same for each
        type, by name.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("there are no predictions to score; check that the evaluation's samples are not empty")
    rows_by_type: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        rows_by_type[row["type"] or UNTYPED].append(row)
    by_type = {name: _score(rows_by_type[name]) for name in sorted(rows_by_type)}
    return {**_score(rows), "by_type": by_type}


def _score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    num_right = sum(int(score_row(row)) for row in rows)
    answers = Counter(normalise_answer(row["answer"]) for row in rows)
    return {
        "exact_match": num_right / len(rows),
        "interval": list(wilson_interval(num_right, len(rows))),
        "num_questions": len(rows),
        "majority_share": max(answers.values()) / len(rows),
        "num_quarantined": sum(bool(row["quarantined"]) for row in rows),
    }
