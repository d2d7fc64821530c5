"""Token ids of very many texts: each distinct word is encoded once, and the rest is arithmetic over columns.

A tokenizer of SentencePiece's kind (Llama's and Vicuna's) writes "▁" for a space and then takes a whole text as one word.
That is slow, and no such word is met twice. But byte-pair encoding only ever joins neighbours into a piece of its vocabulary.
Between two characters that stand side by side in no piece nothing is joined, so a text may be cut there and its parts encoded
alone.
"""

import threading
from collections.abc import Sequence
from itertools import compress, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer, models

_SPACE = "▁"
_SPACES = f"{_SPACE}+"
_IDS = pa.list_(pa.int32())
# Stands between words while they are cut; texts that hold it are not for this encoder.
_CUT = "\0"
# Distinct words that are remembered, about 200 bytes each.
_MAX_WORDS = 1_000_000


class WordEncoder:
    """Encodes texts word by word, with the ids that the tokenizer gives for the whole text.

    Safe to share between threads.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        model = description["model"]
        self._scheme = _prefix_scheme(description)
        self._bigrams = _bigrams(model["vocab"])
        self._pieces = Tokenizer(models.BPE(**_model_arguments(model)))
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}
        self._known: pa.ListArray = pa.array([], _IDS)

    @classmethod
    def of(cls, description: dict[str, Any]) -> "WordEncoder | None":
        """The encoder for a fast tokenizer's JSON; None when words cannot be proved to be independent in it."""
        return cls(description) if _is_separable(description) else None

    def can_cut(self, before: str, after: str) -> bool:
        """Whether a text may be cut between two of its characters without changing a token."""
        return (before + after).replace(" ", _SPACE) not in self._bigrams

    def can_encode(self, text: str) -> bool:
        """Return whether the text is free of the character that this encoder cuts at."""
        return _CUT not in text

    def prefix(self, text: str, *, after_special: bool) -> str:
        """Return the prefix that the tokenizer puts before a text, as `meteor.text.encoder.TextEncoder` does."""
        if not text or self._scheme == "never" or (self._scheme == "first" and after_special):
            return ""
        return "" if self._scheme != "normalizer" and text.startswith((" ", _SPACE)) else _SPACE

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts that start with their prefixes.

        Returns:
            (N,) int32, the token ids of all texts one after the other; and (texts + 1,) int, the offsets of the texts in them.
        """
        # A template's own words, which come with every turn, are encoded once.
        all_texts = pa.array(texts, pa.string()).dictionary_encode()
        words = _cut_words(all_texts.dictionary)
        distinct = words.values.dictionary_encode()
        known, places = self._look_up(distinct.dictionary.to_pylist())
        by_word = known.take(pa.array(places[distinct.indices.to_numpy()]))
        by_text = pa.ListArray.from_arrays(by_word.offsets.take(words.offsets), by_word.values)
        ids = by_text.take(all_texts.indices)
        return ids.values.to_numpy(), ids.offsets.to_numpy()

    def _look_up(self, words: list[str]) -> tuple[pa.ListArray, np.ndarray]:
        """Return the token ids of all known words, and the position of each given word among them."""
        with self._lock:
            if len(self._places) > _MAX_WORDS:
                self._places, self._known = {}, pa.array([], _IDS)
            places = np.fromiter(map(self._places.get, words, repeat(-1)), np.int64, len(words))
            is_new = places < 0
            new = list(compress(words, is_new))
            if new:
                encodings = self._pieces.encode_batch_fast(new, add_special_tokens=False)
                first = len(self._known)
                places[is_new] = np.arange(first, first + len(new))
                self._places.update(zip(new, range(first, first + len(new)), strict=True))
                self._known = pa.concat_arrays([self._known, pa.array([encoding.ids for encoding in encodings], _IDS)])
            return self._known, places


def _cut_words(texts: pa.StringArray) -> pa.ListArray:
    """Split each text into words that begin with their spaces."""
    cut = pc.replace_substring(texts, " ", _CUT + _SPACE)
    # Several spaces in a row belong to one word; a regular expression for all texts would take five times as long.
    is_odd = pc.or_(pc.match_substring(texts, "  "), pc.match_substring(texts, _SPACE))
    odd = pc.replace_substring_regex(pc.replace_substring(texts.filter(is_odd), " ", _SPACE), _SPACES, f"{_CUT}\\0")
    return pc.split_pattern(pc.replace_with_mask(cut, is_odd, odd), _CUT)


def _is_separable(description: dict[str, Any]) -> bool:
    """Whether the tokenizer is a plain BPE over "▁" whose pieces have it in front alone."""
    model = description["model"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    if model["type"] != "BPE" or any(model.get(name, value) not in (value, "") for name, value in plain.items()):
        return False
    if _prefix_scheme(description) is None or not all(token["special"] for token in description["added_tokens"]):
        return False
    vocabulary = model["vocab"]
    has_bytes = model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    # Without bytes a character that is not in the vocabulary becomes unknown, and neighbours that are unknown one token.
    return has_bytes and not any(_SPACE in piece.lstrip(_SPACE) for piece in vocabulary)


def _prefix_scheme(description: dict[str, Any]) -> str | None:
    """When "▁" comes before a text: by the normalizer always, or Metaspace's scheme; None for tokenizers of other kinds."""
    normalizer, pre_tokenizer = description["normalizer"], description["pre_tokenizer"]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepended = {"type": "Prepend", "prepend": _SPACE}
    if normalizer == {"type": "Sequence", "normalizers": [prepended, replaced]} and pre_tokenizer is None:
        return "normalizer"
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if normalizer is None and pre_tokenizer and metaspace.items() <= pre_tokenizer.items():
        return pre_tokenizer["prepend_scheme"]
    return None


def _bigrams(vocabulary: dict[str, int]) -> set[str]:
    return {piece[i : i + 2] for piece in vocabulary for i in range(len(piece) - 1)}


def _model_arguments(model: dict[str, Any]) -> dict[str, Any]:
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return {"vocab": model["vocab"], "merges": merges, "byte_fallback": True, "fuse_unk": model.get("fuse_unk", False)}
