"""VQA accuracy: agreement with ten annotators, after the official evaluator's normalisation (Antol et al., 2015; VQA v2).

The tables are the official ones, including odd entries (``somebody'd`` loses its apostrophe): corrected tables would treat
other answers as equal, and scores would not compare with published ones.
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
# A period is removed unless a digit follows: "3.5" and ".5" keep theirs.
_PERIOD = re.compile(r"\.(?!\d)")

# The official table maps spellings without apostrophes to these words; words with two apostrophes also have entries in
# which only one of them is missing, which the loop below adds.
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


# VQAv2's validation split has 2 million references, and most of them are a few frequent words.
@lru_cache(maxsize=1 << 16)
def normalise_vqa(text: str) -> str:
    """Normalise punctuation, case, number words, articles and contractions as the official evaluator does.

    A punctuation mark is removed if it stands beside a space anywhere in the text, or if the text has a comma between
    digits; otherwise it becomes a space.
    """
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_number else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, matches among the *other* annotators / 3), in [0, 1].

    As in the official evaluator, answer and references are normalised only if the references are not all equal: "2." does
    not match ten times "2".

    Args:
        prediction: the model's answer.
        answers: answers of the annotators, ten in the published data.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one reference answer")
    # Like the official evaluator, this replaces line breaks and tabs by spaces and keeps all other characters.
    prediction, *references = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(references)) > 1:
        prediction, *references = map(normalise_vqa, (prediction, *references))
    num_matches = Counter(references)[prediction]
    num_others = len(references) - num_matches
    # Annotators who gave this answer have one match fewer among the others.
    total = num_matches * min(1.0, (num_matches - 1) / 3) + num_others * min(1.0, num_matches / 3)
    return total / len(references)
