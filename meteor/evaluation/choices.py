"""Which option an answer to a multiple-choice question names; and MMMU's reading of open answers."""

import random
import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDS = ",.!?;:'"
_LONG_ANSWER = 5
_KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def list_options(options: Sequence[str]) -> str:
    """``A. red``, a line each."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def read_letter(prediction: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names, "" where it names none or several.

    In this order: a letter alone, or at the start with a mark behind it ("B", "(B) red", "B: red"); the text of exactly one
    option; exactly one letter in brackets, or as a word ("The answer is B"). "A" before a word is the article.

    Args:
        prediction: the model's answer.
        options: texts of A, B, ...; no letter beyond them counts.
    """
    letters = LETTERS[: len(options)]
    text = prediction.strip()
    start = re.match(rf"\(?([{letters}])(?:[.:),]|\s*$)", text)
    if start:
        return start.group(1)
    plain = _plain(text)
    same = [letter for letter, option in zip(letters, options, strict=True) if _plain(option) == plain]
    if len(same) == 1 and plain:
        return same[0]
    bracketed = set(re.findall(rf"\(([{letters}])\)", text))
    if len(bracketed) == 1:
        return bracketed.pop()
    words = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", text)) - _articles(text)
    return words.pop() if len(words) == 1 else ""


def _articles(text: str) -> set[str]:
    return {"A"} if re.search(r"(?<![\w'])A(?=\s+\w)", text) else set()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(_ENDS + " ")


def read_mmmu_choice(prediction: str, options: Sequence[str], *, seed: str) -> str:
    """The letter that MMMU's official parser reads; a seeded choice where it reads none.

    It looks for "(A)", then for " A ", then, in answers of more than five words, for an option's text; of several finds the
    one that begins last counts. The official code draws at random where nothing is found, from one generator over the whole
    run, so that scores depend on the order of questions; here the draw depends on ``seed`` alone.

    Args:
        prediction: the model's answer.
        options: texts of A, B, ...
        seed: the question's id.
    """
    letters = LETTERS[: len(options)]
    text = prediction
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    places: Mapping[str, int] = {}
    for find in ("({})", " {} "):
        places = places or {one: text.rfind(find.format(one)) for one in letters if find.format(one) in text}
    if not places and len(text.split()) > _LONG_ANSWER:
        low = text.lower()
        places = {
            one: low.rfind(option.lower())
            for one, option in zip(letters, options, strict=True)
            if option.lower() in low
        }
    if places:
        return max(places, key=lambda one: places[one])
    return random.Random(seed).choice(letters)


def mmmu_open_score(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if MMMU's official reading of an open answer finds one of the references in it.

    Sentences are cut down to what follows "is", "answer", and the like; numbers are compared as numbers rounded to two
    decimals, texts by containment.
    """
    found: list[str | float] = []
    parts = _key_parts(prediction)
    for text in [*parts, *(number for part in parts for number in _numbers(part))]:
        found += _normal_forms(text)
    wanted = [form for answer in answers for form in _normal_forms(answer)]
    numbers = {form for form in wanted if isinstance(form, float)}
    texts = [form for form in wanted if isinstance(form, str)]
    return float(any(one in numbers if isinstance(one, float) else any(text in one for text in texts) for one in found))


def _key_parts(prediction: str) -> list[str]:
    text = prediction.strip().strip(".").lower()
    sentences = text.split("\n")
    parts = []
    for i, sentence in enumerate(sentences):
        phrases = (*_KEY_PHRASES, "=") if i == len(sentences) - 1 else _KEY_PHRASES
        tails = [sentence.rpartition(phrase)[2].strip() for phrase in phrases if phrase in sentence]
        shortest = min(filter(None, tails), key=len, default="")
        if shortest and shortest not in ":,.!?;'":
            parts.append(shortest)
    return parts or [text]


def _numbers(text: str) -> list[str]:
    with_commas = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text)
    scientific = re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    plain = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    return [*with_commas, *scientific, *plain]


def _normal_forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        # A single letter would be found in nearly every answer.
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
