"""Metrics of benchmarks: the score of an answer, and the number that the scores of all questions give."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.errors import DataError
from meteor.evaluation.choices import mmmu_open_score, read_letter, read_mmmu_choice
from meteor.evaluation.questions import Question
from meteor.evaluation.scoring import (
    anls,
    exact_match,
    normalise_answer,
    pope_scores,
    read_true_false,
    read_yes_no,
    relaxed_accuracy,
    vqa_accuracy,
)
from meteor.intervals import mean_influences

# Rows of `meteor.evaluation.score_table` that have a score.
Rows = Sequence[Mapping[str, Any]]
# A number, and each row's influence on it, from which its standard error is estimated (`meteor.intervals`).
Estimate = tuple[float, list[float]]


def mean_score(rows: Rows) -> Estimate:
    """Return the mean score of all questions."""
    scores = [row["score"] for row in rows]
    return sum(scores) / len(scores), mean_influences(scores)


def mean_of_types(rows: Rows) -> Estimate:
    """Return the mean of the types' means, so that ChartQA's human and augmented halves have equal weight."""
    return _over_types(rows, mean_score)


def f1_of_types(rows: Rows) -> Estimate:
    """Return the mean F1 of the types, with "yes" as the positive class, as for POPE's three categories."""
    return _over_types(rows, _f1)


def _over_types(rows: Rows, estimate: Callable[[Rows], Estimate]) -> Estimate:
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[row["type"]].append(i)
    values, influences = [], [0.0] * len(rows)
    for positions in places.values():
        value, parts = estimate([rows[i] for i in positions])
        values.append(value)
        for i, part in zip(positions, parts, strict=True):
            influences[i] = part / len(places)
    return sum(values) / len(values), influences


def _f1(rows: Rows) -> Estimate:
    """Return 2 hits / (2 hits + false alarms + misses) with influences from the linear part of this ratio of sums."""
    tops = [2.0 * (row["read_as"] == row["answer"] == "yes") for row in rows]
    bottoms = [top + (row["read_as"] != row["answer"]) for top, row in zip(tops, rows, strict=True)]
    # The sum is 0 if every answer is a right "no"; the score is then 0.
    whole = max(sum(bottoms), 1.0)
    value = sum(tops) / whole
    return value, [(top - value * bottom) / whole for top, bottom in zip(tops, bottoms, strict=True)]


def no_extra(rows: Rows) -> dict[str, float]:
    """Return no further numbers."""
    return {}


@dataclass(frozen=True)
class Metric:
    """Scoring of a benchmark.

    Attributes:
        name: name in ``scores.json`` and MLflow.
        score: function (question, prediction) -> 0 ... 1, or None if the score cannot be computed here.
        version: number that increases when a change of the code gives an unchanged answer another score.
        read: function (question, prediction) -> the part that is compared: a letter, yes or no.
        wrong: function (question) -> wrong answer for a question whose image is quarantined.
        combine: function that turns the rows of all questions into one number.
        extra: function that gives further numbers for these rows.
        circular: whether a question counts as right only if all its prompts (its `unit`) are right.
        of_text: whether the score depends on the prediction's text alone.
    """

    name: str
    score: Callable[[Question, str], float | None]
    version: int = 1
    read: Callable[[Question, str], str] = lambda question, prediction: prediction.strip()
    wrong: Callable[[Question], str] = lambda question: ""
    combine: Callable[[Rows], Estimate] = mean_score
    extra: Callable[[Rows], dict[str, float]] = no_extra
    circular: bool = False
    of_text: bool = True


VQA_ACCURACY = Metric("vqa_accuracy", lambda question, prediction: vqa_accuracy(prediction, question.references))
ANLS = Metric("anls", lambda question, prediction: anls(prediction, question.references))
EXACT_MATCH = Metric(
    "exact_match",
    lambda question, prediction: exact_match(prediction, question.references[0]),
    read=lambda question, prediction: normalise_answer(prediction),
)


def relaxed(*, compat: bool) -> Metric:
    """Make ChartQA's relaxed accuracy; see `relaxed_accuracy` for ``compat``."""
    return Metric(
        "relaxed_accuracy" if compat else "relaxed_accuracy_zero_repaired",
        lambda question, prediction: relaxed_accuracy(prediction, question.references[0], compat=compat),
        combine=mean_of_types,
    )


def _letter(question: Question, prediction: str) -> str:
    return read_letter(prediction, question.choices)


LETTER = Metric(
    "accuracy",
    lambda question, prediction: float(_letter(question, prediction) == question.references[0]),
    read=_letter,
)
CIRCULAR = Metric("circular_accuracy", LETTER.score, read=_letter, circular=True)


def _read_mmmu(question: Question, prediction: str) -> str:
    return read_mmmu_choice(prediction, question.choices, seed=question.id) if question.choices else prediction.strip()


def _score_mmmu(question: Question, prediction: str) -> float:
    if question.choices:
        return float(_read_mmmu(question, prediction) in question.references)
    return mmmu_open_score(prediction, question.references)


MMMU_ACCURACY = Metric("mmmu_accuracy", _score_mmmu, read=_read_mmmu)


def _pope_extra(rows: Rows) -> dict[str, float]:
    by_type: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_type[row["type"]].append(row)
    scores = [
        pope_scores([row["read_as"] for row in part], [row["answer"] for row in part]) for part in by_type.values()
    ]
    return {name: sum(numbers[name] for numbers in scores) / len(scores) for name in scores[0]}


POPE_F1 = Metric(
    "f1",
    lambda question, prediction: float(read_yes_no(prediction) == question.answer),
    read=lambda question, prediction: read_yes_no(prediction),
    wrong=lambda question: "no" if question.answer == "yes" else "yes",
    combine=f1_of_types,
    extra=_pope_extra,
)


def _statement(row: Mapping[str, Any]) -> str:
    """Return the id of a row's statement: "test-3776-0" for "test-3776-0-1", which shows its boxes in another order."""
    return str(row["id"]).rpartition("-")[0]


def _consistency(rows: Rows) -> dict[str, float]:
    by_statement: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_statement[_statement(row)].append(row["score"])
    # A statement counts as consistent only if it is judged right for every order of its boxes.
    several = [scores for scores in by_statement.values() if len(scores) > 1]
    if not several:
        return {}
    return {
        "consistency": sum(min(scores) for scores in several) / len(several),
        "num_statements": len(several),
    }


TRUE_FALSE = Metric(
    "accuracy",
    lambda question, prediction: float(read_true_false(prediction) == read_true_false(question.answer)),
    read=lambda question, prediction: read_true_false(prediction),
    extra=_consistency,
)


def judged(verdicts: Mapping[str, float] | None) -> Metric:
    """Make MM-Vet's metric from a judge's verdicts by question id, each in [0, 1]; without verdicts scores are None."""

    def score(question: Question, prediction: str) -> float | None:
        if verdicts is None:
            return None
        if question.id not in verdicts:
            raise DataError(
                f"the judge's file has no verdict on question {question.id!r}: give a verdict on every answer of this run"
            )
        return verdicts[question.id]

    return Metric("judge", score, of_text=False)
