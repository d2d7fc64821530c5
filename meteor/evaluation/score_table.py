"""From questions and predictions to rows (one a prompt) and to a set's table of scores with 95 % intervals."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from meteor.errors import DataError
from meteor.evaluation.metrics import EXACT_MATCH, Metric
from meteor.evaluation.questions import Question
from meteor.evaluation.scoring import normalise_answer
from meteor.intervals import share_interval, standard_error

UNTYPED = "untyped"


def score_rows(
    name: str, asked: Sequence[tuple[Question, str, str]], metric: Metric = EXACT_MATCH
) -> list[dict[str, Any]]:
    """One row a prompt, in the order given.

    Args:
        name: of the question set.
        asked: (question, prediction, reason): ``reason`` says why its image is quarantined, "" where it is not; such a
            question counts as wrong, also with the right answer.
        metric: of the benchmark.

    Returns:
        ``set``, ``id``, ``group``, ``image``, ``type``, ``question``, ``answer``, ``references``, ``prediction``,
        ``read_as``, ``score`` (0 ... 1, or None), ``quarantined``, ``quarantine_reason``. The mean of ``score`` over a set is
        its mean over questions: of several rotations of one question the first carries the score, the others None.
    """
    rows = []
    for question, prediction, reason in asked:
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


def _score_together(rows: Sequence[dict[str, Any]]) -> None:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["score"] is None:
            continue
        if (leader := first.setdefault(row["group"], row)) is not row:
            leader["score"] = min(leader["score"], row["score"])
            row["score"] = None


def score_table(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], metric: Metric = EXACT_MATCH
) -> dict[str, Any]:
    """One set's scores, over all questions and for each type.

    Args:
        rows: of `score_rows`, of one set.
        questions: the same, for what always giving one answer would score.
        metric: of the benchmark.

    Returns:
        ``metric`` and ``metric_version``; ``score`` and its ``interval`` [low, high] (95 %, clustered by image; None with
        fewer than two), both None where answers cannot be scored here; ``num_questions``, ``num_quarantined``;
        ``majority_score`` (what always giving the most frequent answer would score); the metric's further numbers under
        ``extra``; and ``by_type``: the same for each type, by name.

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
    whole = _part(rows, questions, metric)
    return {"metric": metric.name, "metric_version": metric.version, **whole, "by_type": by_type}


def _part(rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], metric: Metric) -> dict[str, Any]:
    scored = [row for row in rows if row["score"] is not None]
    content: dict[str, Any] = {
        "score": None,
        "interval": None,
        "num_questions": len({row["group"] for row in rows}),
        "majority_score": None,
        "num_quarantined": len({row["group"] for row in rows if row["quarantined"]}),
        "extra": {},
    }
    if not scored:
        return content
    value, influences = metric.combine(scored)
    clusters = [row["image"] or row["group"] for row in scored]
    error, num_clusters = standard_error(influences, clusters), len(set(clusters))
    return content | {
        "score": value,
        "interval": None if error is None else list(share_interval(min(max(value, 0.0), 1.0), error, num_clusters)),
        "majority_score": _majority_score(questions, metric),
        "extra": metric.extra(scored),
    }


def _majority_score(questions: Sequence[Question], metric: Metric) -> float | None:
    """What giving the most frequent reference to every question would score; None where a judge decides."""
    if not metric.of_text:
        return None
    known = [question for question in questions if question.references]
    [(constant, _)] = Counter(normalise_answer(question.answer) for question in known).most_common(1)
    constant = constant.upper() if known[0].choices else constant
    rows = score_rows("", [(question, constant, "") for question in known], metric)
    return metric.combine([row for row in rows if row["score"] is not None])[0]
