"""VQA accuracy: agreement with ten annotators, after the official evaluator's normalisation (Antol et al., 2015; VQA v2).

The tables are the official ones, odd entries included (``somebody'd`` loses its apostrophe): other spellings would count
other answers as equal.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# A period goes unless a digit follows: "3.5" keeps its own, and so does ".5".
_PERIOD = re.compile(r"\.(?!\d)")

# Written once, without the apostrophes; each is also known with some of several apostrophes missing, see below.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
for _word in _TWO_APOSTROPHES.split():
    _first, _second, _third = _word.split("'")
    _CONTRACTIONS |= {f"{_first}{_second}'{_third}": _word, f"{_first}'{_second}{_third}": _word}
_CONTRACTIONS |= {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


@lru_cache(maxsize=1 << 16)  # VQAv2's validation split has 2 million references, most of them the same few words
def normalise_vqa(text: str) -> str:
    """Punctuation, then case, number words, articles and contractions, as the official evaluator treats them.

    A punctuation mark disappears where it stands beside a space somewhere in the text, or where the text has a comma
    between digits; elsewhere it becomes a space.
    """
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_number else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the *others* / 3), in [0, 1].

    Answer and references are normalised only where the references are not all equal, as the official evaluator does: "2."
    does not match ten times "2".

    Args:
        prediction: the model's answer.
        answers: of the annotators, ten in the published data.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one reference answer")
    # Line breaks and tabs become spaces; what else is inside stays.
    prediction, *references = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(references)) > 1:
        prediction, *references = map(normalise_vqa, (prediction, *references))
    num_matches = Counter(references)[prediction]
    num_others = len(references) - num_matches
    # Those who gave this answer see one match fewer among the others.
    total = num_matches * min(1.0, (num_matches - 1) / 3) + num_others * min(1.0, num_matches / 3)
    return total / len(references)
