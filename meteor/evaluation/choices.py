"""Reading of answers: the option that an answer to a multiple-choice question names, and MMMU's open answers."""

import random
import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDS = ",.!?;:'"
# MMMU's parser searches answers with more words than this for the text of an option.
_LONG_ANSWER = 5
# Phrases of MMMU's parser, behind which it expects the answer.
_KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def list_options(options: Sequence[str]) -> str:
    """Write the options as lines like ``A. red``."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def read_letter(prediction: str, options: Sequence[str]) -> str:
    """Return the letter of the option that an answer names, "" if it names none or several.

    The first of these readings that succeeds counts:

    - a letter alone, or at the start with a mark behind it ("B", "(B) red", "B: red")
    - the text of exactly one option
    - exactly one letter in brackets, or as a word ("The answer is B"); an "A" before a word is the article

    Args:
        prediction: the model's answer.
        options: texts of the options A, B, ...; letters beyond them do not count.
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
    # The apostrophe excludes letters of contractions such as "I'd".
    words = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", text)) - _articles(text)
    return words.pop() if len(words) == 1 else ""


def _articles(text: str) -> set[str]:
    return {"A"} if re.search(r"(?<![\w'])A(?=\s+\w)", text) else set()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(_ENDS + " ")


def read_mmmu_choice(prediction: str, options: Sequence[str], *, seed: str) -> str:
    """Return the letter that MMMU's official parser reads, or a seeded choice if it reads none.

    The parser looks for "(A)", then for " A ", then, in answers of more than five words, for an option's text. If it finds
    several, the last in the text counts. If it finds none, the official code draws from one random generator over the whole
    run, so that scores depend on the order of questions. Here the draw depends on ``seed`` alone.

    Args:
        prediction: the model's answer.
        options: texts of the options A, B, ...
        seed: the question's id.
    """
    letters = LETTERS[: len(options)]
    text = prediction
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    places: Mapping[str, int] = {}
    for find in ("({})", " {} "):
        places = places or {
            letter: text.rfind(find.format(letter)) for letter in letters if find.format(letter) in text
        }
    if not places and len(text.split()) > _LONG_ANSWER:
        low = text.lower()
        places = {
            letter: low.rfind(option.lower())
            for letter, option in zip(letters, options, strict=True)
            if option.lower() in low
        }
    if places:
        return max(places, key=lambda letter: places[letter])
    return random.Random(seed).choice(letters)


def mmmu_open_score(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if MMMU's official parser finds a reference in an open answer, else 0.0.

    Each sentence is cut to the words that follow "is", "answer" and similar words. Numbers are compared after rounding to
    two decimals; a text is found if the answer contains it.
    """
    found: list[str | float] = []
    parts = _key_parts(prediction)
    for text in [*parts, *(number for part in parts for number in _numbers(part))]:
        found += _normal_forms(text)
    wanted = [form for answer in answers for form in _normal_forms(answer)]
    numbers = {form for form in wanted if isinstance(form, float)}
    texts = [form for form in wanted if isinstance(form, str)]
    return float(
        any(form in numbers if isinstance(form, float) else any(text in form for text in texts) for form in found)
    )


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
        # A single letter alone would be found in nearly every answer.
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
