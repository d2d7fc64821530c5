"""Scores of single answers as pure functions of texts.

VQA accuracy is in `meteor.evaluation.vqa_accuracy`, multiple choice in `meteor.evaluation.choices`.
"""

from collections import Counter
from collections.abc import Sequence

from meteor.evaluation.vqa_accuracy import vqa_accuracy

__all__ = [
    "anls",
    "exact_match",
    "normalise_answer",
    "pope_scores",
    "read_true_false",
    "read_yes_no",
    "relaxed_accuracy",
    "vqa_accuracy",
]


def normalise_answer(text: str) -> str:
    """Lower the case, collapse white space and remove a trailing ".": LLaVA's rule for GQA's short answers."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 if both texts are equal after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(answer))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Return the average normalised Levenshtein similarity (ANLS) of an answer (Biten et al., 2019), in [0, 1].

    The similarity is 1 - edits / length of the longer text, for the best reference. Edits are counted between lower-case
    texts with collapsed white space, but lengths are those of the unchanged texts. Two empty texts are equal.

    Args:
        prediction: the model's answer.
        answers: reference answers.
        threshold: similarity below which the score is 0.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("ANLS needs at least one reference answer")
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(first: str, second: str) -> float:
    length = max(len(first), len(second))
    edits = _edit_distance(" ".join(first.lower().split()), " ".join(second.lower().split()))
    # Lower case can be longer than the text itself ("İ" becomes two characters).
    return max(0.0, 1 - edits / length) if length else 1.0


def _edit_distance(first: str, second: str) -> int:
    """Return Levenshtein's distance, computed row by row of its table, so that only one row is in memory."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above_left, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (a != b))
    return row[-1]


def relaxed_accuracy(prediction: str, target: str, tolerance: float = 0.05, compat: bool = True) -> float:
    """Return ChartQA's relaxed accuracy: 1.0 for a number close to the target or an equal text, else 0.0.

    Texts are compared without case, and "50%" is the number 0.5. The reference code compares a target of 0 as text, because
    0 is false in Python, so that "0.0" counts as wrong.

    Args:
        prediction: the model's answer.
        target: the reference answer.
        tolerance: largest difference, relative to the target.
        compat: keep the reference code's behaviour for a target of 0; with False, 0 is compared as a number.
    """
    guess, wanted = _number(prediction), _number(target)
    if guess is None or wanted is None or (compat and wanted == 0):
        return float(prediction.strip().lower() == target.strip().lower())
    return float(abs(guess - wanted) <= tolerance * abs(wanted))


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    # Python parses "nan" and "inf" as numbers, but in an answer they are words.
    return value if abs(value) < float("inf") else None


def read_yes_no(prediction: str) -> str:
    """Read an answer as POPE does: "no" if its first sentence has the word "no" or "not", else "yes"."""
    words = prediction.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Return POPE's five numbers for a category (Li et al., 2023), with "yes" as the positive class.

    Args:
        predictions: the model's answers, which `read_yes_no` reads.
        labels: "yes" or "no" for each answer.

    Returns:
        accuracy, precision, recall, f1, and yes_ratio, the share of *predictions* that say yes. Precision is 0 if no
        prediction is positive, and recall is 0 if no label is; f1 is then 0 too.

    Raises:
        ValueError: the numbers of predictions and labels differ, there are no labels, or a label is neither yes nor no.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(
            f"{len(predictions)} predictions for {len(labels)} labels; the numbers must be equal and not 0"
        )
    if wrong := set(labels) - {"yes", "no"}:
        raise ValueError(f"POPE's labels are yes and no, not {sorted(wrong)}")
    count = Counter((read_yes_no(prediction), label) for prediction, label in zip(predictions, labels, strict=True))
    hits, false_alarms, misses = count["yes", "yes"], count["yes", "no"], count["no", "yes"]
    return {
        "accuracy": (hits + count["no", "no"]) / len(labels),
        "precision": hits / max(hits + false_alarms, 1),
        "recall": hits / max(hits + misses, 1),
        "f1": 2 * hits / max(2 * hits + false_alarms + misses, 1),
        "yes_ratio": (hits + false_alarms) / len(labels),
    }


def read_true_false(prediction: str) -> str:
    """Read an answer as "true" or "false" by its first word (true, yes, false, no), else return it normalised."""
    words = normalise_answer(prediction).replace(",", " ").replace(".", " ").split()
    first = words[0] if words else ""
    return {"yes": "true", "no": "false", "true": "true", "false": "false"}.get(first, normalise_answer(prediction))
