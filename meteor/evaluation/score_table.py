"""Scores of a question set: one row per prompt, and a table of scores with 95 % intervals."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from meteor.data.samples import SampleProblem
from meteor.errors import DataError
from meteor.evaluation.metrics import EXACT_MATCH, Metric
from meteor.evaluation.questions import Question
from meteor.evaluation.scoring import normalise_answer
from meteor.intervals import share_interval, standard_error

UNTYPED = "untyped"


def score_rows(
    name: str, predictions: Sequence[tuple[Question, str, str]], metric: Metric = EXACT_MATCH
) -> list[dict[str, Any]]:
    """Score predictions and return one row per prompt, in their order.

    Args:
        name: name of the question set.
        predictions: (question, prediction, reason) per prompt; ``reason`` says why the image is quarantined, or is "". A
            question with a quarantined image counts as wrong, whatever the prediction.
        metric: the benchmark's metric.

    Returns:
        Rows with ``set``, ``id``, ``group``, ``image``, ``type``, ``question``, ``answer``, ``references``, ``prediction``,
        ``read_as``, ``score`` (0 ... 1, or None), ``quarantined`` and ``quarantine_reason``. If a question has several
        rotations, its first row has the score and the others None, so that a mean over rows is a mean over questions.
    """
    rows = []
    for question, prediction, reason in predictions:
        score: float | None = None
        if question.references:
            score = metric.score(question, prediction)
            score = 0.0 if reason and score is not None else score
        rows.append(
            {
                "set": name,
                "id": question.id,
                "group": question.unit,
                "image": ", ".join(question.sample.images),
                "type": question.sample.type,
                "question": question.text,
                "answer": question.answer,
                "references": list(question.references),
                "prediction": prediction,
                "read_as": metric.wrong(question) if reason else metric.read(question, prediction),
                "score": score,
                "quarantined": bool(reason),
                "quarantine_reason": reason,
            }
        )
    if metric.circular:
        _score_together(rows)
    return rows


def unusable_rows(name: str, problems: Sequence[SampleProblem], *, is_scored: bool) -> list[dict[str, Any]]:
    """Return a row for each record that is no question which can be asked; it counts as wrong.

    Args:
        name: name of the question set.
        problems: records that cannot be used.
        is_scored: whether the answers of the set are scored here; the rows have no score otherwise.
    """
    texts = ("image", "type", "question", "answer", "prediction", "read_as")
    return [
        {
            **dict.fromkeys(texts, ""),
            "set": name,
            "id": problem.sample_id,
            "group": problem.sample_id,
            "references": [],
            "score": 0.0 if is_scored else None,
            "quarantined": True,
            "quarantine_reason": f"{problem.reason}: {problem.message}",
        }
        for problem in problems
    ]


def _score_together(rows: Sequence[dict[str, Any]]) -> None:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["score"] is None:
            continue
        if (leader := first.setdefault(row["group"], row)) is not row:
            # The minimum is 1 only if every rotation is right.
            leader["score"] = min(leader["score"], row["score"])
            row["score"] = None


def score_table(
    rows: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    metric: Metric = EXACT_MATCH,
    *,
    num_unusable: int = 0,
) -> dict[str, Any]:
    """Combine the rows of a set into scores, over all questions and for each type.

    A record that cannot be used counts as a wrong question: the score is multiplied by the share of usable questions. For a
    mean of questions this is exact. Scores of types and further numbers are those of the usable questions, because the type
    of such a record is not known.

    Args:
        rows: rows of a set from `score_rows`.
        questions: questions of these rows, for the score of a constant answer.
        metric: the benchmark's metric.
        num_unusable: number of records that cannot be used, which have no rows here.

    Returns:
        A table with these entries. Everything from ``score`` to ``extra`` is also in ``by_type``, for each type by name.

        - ``metric`` and ``metric_version``
        - ``score``, or None if answers cannot be scored here
        - ``interval``, the 95 % interval [low, high], clustered by image; None with fewer than two images
        - ``num_questions``, and ``num_quarantined``: how many of them count as wrong because their record or an image cannot
          be used
        - ``majority_score``, the score of always giving the most frequent answer
        - ``extra``, further numbers of the metric

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("there are no predictions to score; check that the evaluation's samples are not empty")
    types: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        types[row["type"] or UNTYPED].append(i)
    by_type = {
        name: _part([rows[i] for i in types[name]], [questions[i] for i in types[name]], metric)
        for name in sorted(types)
    }
    whole = _part(rows, questions, metric, num_unusable)
    return {"metric": metric.name, "metric_version": metric.version, **whole, "by_type": by_type}


def _part(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], metric: Metric, num_unusable: int = 0
) -> dict[str, Any]:
    scored = [row for row in rows if row["score"] is not None]
    num_usable = len({row["group"] for row in rows})
    share = num_usable / (num_usable + num_unusable)
    content: dict[str, Any] = {
        "score": None,
        "interval": None,
        "num_questions": num_usable + num_unusable,
        "majority_score": None,
        "num_quarantined": len({row["group"] for row in rows if row["quarantined"]}) + num_unusable,
        "extra": {},
    }
    if not scored:
        return content
    value, influences = metric.combine(scored)
    value, influences = share * value, [share * influence for influence in influences]
    # Questions about an image are not independent, so the image is the unit of the standard error.
    clusters = [row["image"] or row["group"] for row in scored]
    error, num_clusters = standard_error(influences, clusters), len(set(clusters))
    return content | {
        "score": value,
        "interval": None if error is None else list(share_interval(min(max(value, 0.0), 1.0), error, num_clusters)),
        "majority_score": None if (constant := _majority_score(questions, metric)) is None else share * constant,
        "extra": metric.extra(scored),
    }


def _majority_score(questions: Sequence[Question], metric: Metric) -> float | None:
    """Return the score of giving the most frequent reference to every question; None if a judge decides."""
    if not metric.of_text:
        return None
    known = [question for question in questions if question.references]
    [(constant, _)] = Counter(normalise_answer(question.answer) for question in known).most_common(1)
    # `normalise_answer` has lowered the letters of options.
    constant = constant.upper() if known[0].choices else constant
    rows = score_rows("", [(question, constant, "") for question in known], metric)
    return metric.combine([row for row in rows if row["score"] is not None])[0]
