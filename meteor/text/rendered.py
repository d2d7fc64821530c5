"""Token ids of text that a chat template has written, equal to those of its conversation."""

from transformers import PreTrainedTokenizerBase

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.text.chat import special_pattern
from meteor.text.prompt import split_special
from meteor.text.segments import Image, Segment, Span, SpecialToken, Text
from meteor.text.template import prompt_template
from meteor.text.tokens import TokenisedSample, begin_id, begin_with, encode_segments, unlabelled


def tokenise_prompt(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    add_begin: bool = True,
    with_spans: bool = False,
) -> TokenisedSample:
    """Turn text that a chat template has written into the token ids that `tokenise` gives for its conversation.

    Special tokens in the text are special tokens, and ``<image>`` is the place of an image. The two functions differ only if
    the words of a user look like special tokens.

    Args:
        text: text of the template, with or without its beginning token.
        tokenizer: fast tokenizer with the special token ``<image>``.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        add_begin: whether a beginning token is added if the template begins with one and the text does not.
        with_spans: whether to return the character spans of tokens in the text.
    """
    bos_id, position = begin_id(tokenizer, template), 0
    if bos_id is not None and text.startswith(tokenizer.bos_token):
        # Text behind the beginning token is encoded as text at the start, as in `tokenise`.
        position = len(tokenizer.bos_token)
    has_begin = position > 0
    segments: list[Segment] = []
    starts: list[int] = []
    turn = 0
    for part in split_special(text[position:], special_pattern(tokenizer, len(tokenizer))):
        if not part:
            continue
        written = part.token if isinstance(part, SpecialToken) else part
        # A special token may have absorbed white space around it.
        starts.append(text.index(written, position))
        position = starts[-1] + len(written)
        if isinstance(part, SpecialToken) and part.token == IMAGE_PLACEHOLDER:
            # A caption has no words by which tokens could be chosen, so its image belongs to no turn.
            turn += template != "plain" and not _follows_image(segments)
            segments.append(Image(turn))
        elif isinstance(part, SpecialToken):
            segments.append(part)
        else:
            segments.append(Text(part, questions=_question(part, segments, template, tokenizer)))
    sample = unlabelled(encode_segments(segments, tokenizer, starts if with_spans else ()))
    return begin_with(bos_id, sample) if bos_id is not None and (has_begin or add_begin) else sample


def _follows_image(segments: list[Segment]) -> bool:
    """Return whether the last segments are an image and at most a newline."""
    before = segments[-2:] if segments and segments[-1] == Text("\n") else segments[-1:]
    return bool(before) and isinstance(before[0], Image)


def _question(text: str, before: list[Segment], template: str, tokenizer: PreTrainedTokenizerBase) -> dict[int, Span]:
    """Return the span of the words that follow images in their turn, as `SegmentWriter.question` records it."""
    if not before or not isinstance(before[-1], Image) or text == "\n" or template == "plain":
        return {}
    start = int(text.startswith("\n"))
    # Text that ends a question before its first special token; a template's end token ends the text itself.
    fixed = prompt_template(template, tokenizer)
    closing = next(iter(split_special(fixed.before_answer, fixed.special_tokens)))
    end = text.find(closing, start) if closing and isinstance(closing, str) else -1
    return {before[-1].turn: (start, len(text) if end < 0 else end)}
