"""Encoding of text to token ids and character spans; no part of the text is ever read as a special token."""

import json
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from meteor.errors import SettingsError
from meteor.text.segments import Span
from meteor.text.words import WordEncoder


class TextEncoder:
    """Encoder of text with private copies of a fast tokenizer's backend.

    The switch that reads special tokens as text (``encode_special_tokens``, transformers' ``split_special_tokens``) is a
    state of the backend. Setting it on the caller's tokenizer would change the caller's own calls and race with other
    threads, so copies are used.
    """

    def __init__(self, backend: Tokenizer) -> None:
        description = json.loads(backend.to_str())
        self.words = WordEncoder.of(description)
        self._opening = _copy(description)
        # Vicuna 1.5 and Llama 2 ("legacy": false) put "▁" before a text, but not after a special token: "</s>USER" must
        # give "US", not "▁US". Here the text after "</s>" is encoded alone, so it needs a backend without the prefix.
        self._following = _copy(_without_first_prefix(description))

    def encode(self, text: str, *, after_special: bool) -> tuple[list[int], list[Span]]:
        """Return token ids and, for each token, its character span [start, end) in ``text``.

        Args:
            text: text to encode; strings that look like special tokens are encoded as ordinary characters.
            after_special: whether the text follows a special token, instead of an image or the start of the prompt.
        """
        encoding = (self._following if after_special else self._opening).encode(text, add_special_tokens=False)
        return encoding.ids, _without_gaps(encoding.offsets)

    def token_id(self, token: str) -> int:
        """Return the id of a special token."""
        found = self._opening.token_to_id(token)
        assert found is not None, f"{token!r} was found among the tokenizer's own added tokens"
        return found


@lru_cache(maxsize=8)
def text_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> TextEncoder:
    """Return the encoder of a tokenizer.

    Args:
        tokenizer: fast tokenizer.
        vocabulary_size: ``len(tokenizer)``, part of the cache's key: a tokenizer with new tokens is copied again.

    Raises:
        SettingsError: the tokenizer is not fast, so it gives no character positions, by which answers are found.
    """
    if not tokenizer.is_fast:
        raise SettingsError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it gives no character positions: load it with "
            "meteor.text.tokenizer.load_tokenizer."
        )
    return TextEncoder(tokenizer.backend_tokenizer)


def _copy(description: dict) -> Tokenizer:
    copy = Tokenizer.from_str(json.dumps(description))
    # A saved tokenizer may truncate or pad by itself, which would lose or add tokens without notice.
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _without_first_prefix(description: dict) -> dict:
    def change(pre_tokenizer: dict) -> dict:
        if pre_tokenizer["type"] == "Sequence":
            return pre_tokenizer | {"pretokenizers": [change(step) for step in pre_tokenizer["pretokenizers"]]}
        if pre_tokenizer.get("prepend_scheme") == "first":
            return pre_tokenizer | {"prepend_scheme": "never"}
        return pre_tokenizer

    pre_tokenizer = description["pre_tokenizer"]
    return description | {"pre_tokenizer": change(pre_tokenizer) if pre_tokenizer else None}


def _without_gaps(offsets: list[Span]) -> list[Span]:
    """Extend every token's span to begin where the previous token ended, or earlier, and an empty span to the next token.

    Byte-level tokenizers trim spaces off the offsets, so that a lone "Ġ" has an empty span. Bytes of one character share
    its offsets.
    """
    spans = []
    previous_end = 0
    for (start, end), (next_start, _) in zip(offsets, [*offsets[1:], (0, 0)], strict=True):
        spans.append((min(start, previous_end), max(end, next_start) if start == end else end))
        previous_end = end
    return spans
