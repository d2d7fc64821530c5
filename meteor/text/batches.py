"""Token ids of many conversations at once, equal to what `meteor.text.tokens.tokenise` gives for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import TokenisationError
from meteor.text.conversation import Conversation
from meteor.text.encoder import text_encoder
from meteor.text.segments import EndOfSequence, Image, Segment, SpecialToken, Text
from meteor.text.template import render
from meteor.text.tokens import TokenisedSample, begin_id, end_id, no_answer, tokenise
from meteor.text.words import WordEncoder

# In the place of an id: the item is a text.
_TEXT = -2


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of several samples, one after the other.

    Attributes:
        input_ids: (T,) int32, with one ``IMAGE_PLACE`` in the place of each image.
        is_answer: (T,) bool, whether the token is a label.
        turns: (T,) int32, see `TokenisedSample`.
        offsets: (samples + 1,) where each sample's tokens begin, and the end.
        problems: for each sample what is wrong with it, text that continues ``Sample 'id'``; None when it can be trained on.
    """

    input_ids: np.ndarray
    is_answer: np.ndarray
    turns: np.ndarray
    offsets: np.ndarray
    problems: list[str | None]

    @classmethod
    def of(cls, samples: Sequence[TokenisedSample]) -> "TokenBatch":
        """Samples that were tokenised one by one."""
        items = _Items()
        for sample in samples:
            items.add_sample(sample)
            items.close_sample()
        return replace(items.encode(None), problems=[None] * len(samples))


class BatchTokeniser:
    """Tokenises conversations by batches; safe to share between threads.

    Args:
        tokenizer: a fast tokenizer; it is left as it is.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = text_encoder(tokenizer, len(tokenizer))
        self._begin = begin_id(tokenizer, template)

    def __call__(self, conversations: Sequence[Conversation]) -> TokenBatch:
        """Tokenise.

        Raises:
            SettingsError: the tokenizer does not fit (no end token, no chat template).
        """
        items = _Items()
        problems: list[str | None] = []
        for conversation in conversations:
            problems.append(self._add(items, conversation))
            items.close_sample()
        batch = items.encode(self._encoder.words)
        num_answers = np.add.reduceat(np.append(batch.is_answer, False), batch.offsets[:-1], dtype=np.int64)
        for sample in np.flatnonzero((num_answers == 0) | (np.diff(batch.offsets) == 0)):
            problems[sample] = problems[sample] or f" {no_answer(self._template)}"
        return replace(batch, problems=problems)

    @cached_property
    def _end(self) -> int:
        # Transformers takes 30 microseconds for it.
        return end_id(self._tokenizer)

    def _add(self, items: "_Items", conversation: Conversation) -> str | None:
        try:
            segments = render(conversation, self._template, tokenizer=self._tokenizer)
        except TokenisationError as error:
            return f": {error}"
        if self._encoder.words is None or not self._add_segments(items, segments, self._encoder.words):
            return self._add_slowly(items, conversation)
        return None

    def _add_slowly(self, items: "_Items", conversation: Conversation) -> str | None:
        """One sample by itself, for tokenizers and texts that cannot be cut into words."""
        try:
            sample = tokenise(conversation, self._tokenizer, self._template)
        except TokenisationError:
            return f" {no_answer(self._template)}"
        items.add_sample(sample)
        return None

    def _add_segments(self, items: "_Items", segments: Sequence[Segment], words: WordEncoder) -> bool:
        """Whether all texts could be cut at the ends of answers and questions; if not, nothing is added."""
        start = items.mark()
        if self._begin is not None:
            items.add(self._begin, False, 0)
        after_special = False
        for segment in segments:
            if isinstance(segment, Text):
                if not _add_text(items, segment, words, after_special):
                    items.reset(start)
                    return False
            elif isinstance(segment, Image):
                items.add(IMAGE_PLACE, False, segment.turn)
            elif isinstance(segment, SpecialToken):
                items.add(self._encoder.token_id(segment.token), segment.is_answer, 0)
            else:
                items.add(self._end, True, 0)
            after_special = isinstance(segment, EndOfSequence | SpecialToken)
        return True


def _add_text(items: "_Items", segment: Text, words: WordEncoder, after_special: bool) -> bool:
    text = segment.text
    if not words.can_encode(text):
        return False
    if not segment.answers and not segment.questions:
        items.add_text(words.prefix(text, after_special=after_special) + text, False, 0)
        return True
    # Spans in a text follow one another, and none overlaps another.
    spans = [(start, end, True, 0) for start, end in segment.answers]
    spans += [(start, end, False, turn) for turn, (start, end) in segment.questions.items()]
    prefix, at = words.prefix(text, after_special=after_special), 0
    for start, end, is_answer, turn in sorted(spans):
        for cut in (start, end):
            if 0 < cut < len(text) and not words.can_cut(text[cut - 1], text[cut]):
                return False
        # A prefix belongs to the first token, so it goes with the first words, whatever they are.
        if start > at:
            items.add_text(prefix + text[at:start], False, 0)
            prefix = ""
        items.add_text(prefix + text[start:end], is_answer, turn)
        prefix, at = "", end
    if at < len(text):
        items.add_text(prefix + text[at:], False, 0)
    return True


class _Items:
    """Tokens and texts of samples in their order, before the texts are encoded."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._is_answer: list[bool] = []
        self._turns: list[int] = []
        self._texts: list[str] = []
        self._sample_ends = [0]

    def add(self, token: int, is_answer: bool, turn: int) -> None:
        self._ids.append(token)
        self._is_answer.append(is_answer)
        self._turns.append(turn)

    def add_sample(self, sample: TokenisedSample) -> None:
        self._ids += sample.input_ids
        self._is_answer += [label != IGNORE_INDEX for label in sample.labels]
        self._turns += sample.turns or [0] * len(sample.input_ids)

    def add_text(self, text: str, is_answer: bool, turn: int) -> None:
        self.add(_TEXT, is_answer, turn)
        self._texts.append(text)

    def mark(self) -> tuple[int, int]:
        return len(self._ids), len(self._texts)

    def reset(self, mark: tuple[int, int]) -> None:
        """Take back what was added since `mark`."""
        num_items, num_texts = mark
        for values in (self._ids, self._is_answer, self._turns):
            del values[num_items:]
        del self._texts[num_texts:]

    def close_sample(self) -> None:
        self._sample_ends.append(len(self._ids))

    def encode(self, words: WordEncoder | None) -> TokenBatch:
        item_ids = np.array(self._ids, np.int32)
        is_text = item_ids == _TEXT
        counts = np.ones(len(item_ids), np.int64)
        if words is not None and self._texts:
            text_ids, starts = words.encode(self._texts)
            counts[is_text] = np.diff(starts)
        input_ids = np.repeat(item_ids, counts)
        if words is not None and self._texts:
            input_ids[np.repeat(is_text, counts)] = text_ids
        ends = np.concatenate([[0], np.cumsum(counts)])
        return TokenBatch(
            input_ids,
            np.repeat(np.array(self._is_answer, np.bool_), counts),
            np.repeat(np.array(self._turns, np.int32), counts),
            ends[self._sample_ends],
            [],
        )
