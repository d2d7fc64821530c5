"""Token ids of text that a chat template has written, equal to those of its conversation."""

from transformers import PreTrainedTokenizerBase

from meteor.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER
from meteor.text.chat import special_pattern
from meteor.text.prompt import split_special
from meteor.text.segments import Image, Segment, Span, SpecialToken, Text
from meteor.text.template import prompt_template
from meteor.text.tokens import TokenisedSample, begin_id, encode_segments


def tokenise_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, template: str, *, add_begin: bool = True
) -> TokenisedSample:
    """Turn text that a chat template has written into the token ids that `tokenise` gives for its conversation.

    Special tokens in the text are special tokens, and ``<image>`` is the place of an image. The two functions differ only if
    the words of a user look like special tokens.

    Args:
        text: text of the template, with or without its beginning token.
        tokenizer: fast tokenizer with the special token ``<image>``.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        add_begin: whether a beginning token is added if the template begins with one and the text does not.
    """
    bos_id, has_begin = begin_id(tokenizer, template), False
    if bos_id is not None and text.startswith(tokenizer.bos_token):
        # Text behind the beginning token is encoded as text at the start, as in `tokenise`.
        text, has_begin = text.removeprefix(tokenizer.bos_token), True
    segments: list[Segment] = []
    turn = 0
    for part in split_special(text, special_pattern(tokenizer, len(tokenizer))):
        if isinstance(part, SpecialToken) and part.token == IMAGE_PLACEHOLDER:
            # A caption has no words by which tokens could be chosen, so its image belongs to no turn.
            turn += template != "plain" and not _follows_image(segments)
            segments.append(Image(turn))
        elif isinstance(part, SpecialToken):
            segments.append(part)
        elif part:
            segments.append(Text(part, questions=_question(part, segments, template, tokenizer)))
    input_ids, _, turns = encode_segments(segments, tokenizer)
    if bos_id is not None and (has_begin or add_begin):
        input_ids, turns = [bos_id, *input_ids], [0, *turns]
    return TokenisedSample(input_ids, [IGNORE_INDEX] * len(input_ids), turns)


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
