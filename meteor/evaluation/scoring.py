"""Scores of single answers, as pure functions of texts; needs no model.

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
    """Lower case, white space collapsed, trailing "." removed: LLaVA's rule for GQA's short answers."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two are equal after `normalise_answer`, else 0.0."""
    return float(normalise_answer(prediction) == normalise_answer(answer))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al., 2019), in [0, 1].

    1 - edits / length of the longer, of the best reference; below the threshold 0. Edits are counted between lower-case
    texts with white space collapsed, lengths on the texts as they are. Two empty texts are equal.

    Args:
        prediction: the model's answer.
        answers: references.
        threshold: similarities below it count nothing.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("ANLS needs at least one reference answer")
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(one: str, other: str) -> float:
    length = max(len(one), len(other))
    edits = _edit_distance(" ".join(one.lower().split()), " ".join(other.lower().split()))
    # Lower case can be longer than the text itself ("İ" is two characters then).
    return max(0.0, 1 - edits / length) if length else 1.0


def _edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance, a row of the table at a time."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above_left, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (a != b))
    return row[-1]


def relaxed_accuracy(prediction: str, target: str, tolerance: float = 0.05, compat: bool = True) -> float:
    """ChartQA's: numbers within 5 % of the target, anything else equal but for case; 1.0 or 0.0.

    "50%" is 0.5. The reference code compares a target of 0 as text, because 0 is false: "0.0" is wrong then.

    Args:
        prediction: the model's answer.
        target: the reference.
        tolerance: relative.
        compat: keep the reference's behaviour for a target of 0; with False it is a number as others are.
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
    # "nan" and "inf" are words here.
    return value if abs(value) < float("inf") else None


def read_yes_no(prediction: str) -> str:
    """POPE's reading of an answer: "no" where its first sentence has the word "no" or "not", else "yes"."""
    words = prediction.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """POPE's five numbers of one category (Li et al., 2023); "yes" is the positive class.

    Args:
        predictions: answers as the model gave them; `read_yes_no` reads them.
        labels: "yes" or "no".

    Returns:
        accuracy, precision, recall, f1, and yes_ratio, the share of *predictions* that say yes. Where nothing was
        predicted, or nothing is, positive, precision or recall are 0, and so is f1.

    Raises:
        ValueError: not as many labels as predictions, none at all, or another label.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels; need as many, and some")
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
    """ "true" or "false" where the answer's first word says so in this or another way (yes, no), else the answer itself."""
    words = normalise_answer(prediction).replace(",", " ").replace(".", " ").split()
    first = words[0] if words else ""
    return {"yes": "true", "no": "false", "true": "true", "false": "false"}.get(first, normalise_answer(prediction))
