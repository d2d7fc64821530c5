"""Token ids and labels of a sample: each segment is tokenised once, and labels come from character positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import SettingsError, TokenisationError
from meteor.text.conversation import Conversation, Turn
from meteor.text.encoder import text_encoder
from meteor.text.segments import EndOfSequence, Image, Segment, Span, SpecialToken, Text
from meteor.text.template import prompt_template, render


@dataclass(frozen=True)
class TokenisedSample:
    """A tokenised sample; its lists have one entry per token.

    Attributes:
        input_ids: token ids, with ``IMAGE_PLACE`` at each image; after `meteor.data.collate.expand_images` with the ids of
            `VisualTokens` there.
        labels: token ids at answers and their end tokens, ``IGNORE_INDEX`` elsewhere.
        turns: number of the turn among the turns with images, from 1, at images and at the words after them in their turn;
            0 elsewhere. The list is empty if nothing needs it.
        image_numbers: number of the image in the sample, from 1, at visual slots; 0 elsewhere. The list is empty until
            images are expanded to slots.
        spans: character span [start, end) of the token in the text that a chat template wrote; (0, 0) at visual tokens. The
            list is empty unless `meteor.text.rendered.tokenise_prompt` was asked for it.
    """

    input_ids: list[int]
    labels: list[int]
    turns: list[int] = field(default_factory=list, compare=False)
    image_numbers: list[int] = field(default_factory=list, compare=False)
    spans: list[Span] = field(default_factory=list, compare=False)


def tokenise(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    for_generation: bool = False,
    sample_id: str = "",
) -> TokenisedSample:
    """Turn a conversation into token ids and labels.

    Text between images and end tokens is tokenised as one chunk, as in LLaVA, so the tokenizer's text prefix (``▁`` in
    Vicuna's) follows an image. The beginning token is added once, if the tokenizer has one; the template ``chat`` writes
    its own. A token that overlaps an answer is a label.

    Args:
        conversation: the turns.
        tokenizer: fast tokenizer, which is not changed.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        for_generation: whether to return the prompt alone, up to the last answer; all labels are then ``IGNORE_INDEX``.
        sample_id: id of the sample, for the error.

    Raises:
        SettingsError: the tokenizer does not fit: it is not fast, or has no end token or chat template.
        TokenisationError: the conversation does not fit the template, or has no token to learn.
    """
    try:
        segments = render(conversation, template, tokenizer=tokenizer, for_generation=for_generation)
    except TokenisationError as error:
        raise TokenisationError(f"Sample {sample_id!r}: {error}") from error
    sample = encode_segments(segments, tokenizer)
    if (bos_id := begin_id(tokenizer, template)) is not None:
        sample = begin_with(bos_id, sample)
    if for_generation:
        return unlabelled(sample)
    if all(label == IGNORE_INDEX for label in sample.labels):
        raise TokenisationError(f"Sample {sample_id!r} {no_answer(template)}")
    return sample


def begin_with(token: int, sample: TokenisedSample) -> TokenisedSample:
    """Return the sample with a token before it, which is no label."""
    spans = [(0, 0), *sample.spans] if sample.spans else []
    return TokenisedSample([token, *sample.input_ids], [IGNORE_INDEX, *sample.labels], [0, *sample.turns], spans=spans)


def unlabelled(sample: TokenisedSample) -> TokenisedSample:
    """Return the sample as a prompt, without labels."""
    return replace(sample, labels=[IGNORE_INDEX] * len(sample.labels))


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Check on an example that prompts are prefixes of the tokens that training learns from.

    Raises:
        SettingsError: a prompt is no such prefix, or the chat template cannot write a question with its answer.
    """
    turns = (Turn("human", "What is it?", 1), Turn("gpt", "A cat."), Turn("human", "Is it red?"), Turn("gpt", "No."))
    try:
        num_turns = 4 if template != "plain" and prompt_template(template, tokenizer).between is not None else 2
        whole = tokenise(Conversation(turns[:num_turns]), tokenizer, template)
        for end in range(1, num_turns, 2):
            prompt = tokenise(Conversation(turns[:end]), tokenizer, template, for_generation=True).input_ids
            if whole.input_ids[: len(prompt)] != prompt or whole.labels[len(prompt)] == IGNORE_INDEX:
                raise SettingsError(
                    f"the template {template!r} with this tokenizer makes prompts that differ from the text before the trained "
                    f"answers: {_decode(tokenizer, prompt)!r} and {_decode(tokenizer, whole.input_ids)!r}. Use another template"
                )
    except TokenisationError as error:
        raise SettingsError(f"the template {template!r} does not fit this tokenizer: {error}") from error


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode([token for token in ids if token != IMAGE_PLACE])


def no_answer(template: str) -> str:
    """Describe the problem of a sample without labels; the text follows the sample's name in a message."""
    return (
        f"has no answer token under the template {template!r}, so nothing would be learnt from it: give it a turn from "
        "'gpt', or check that the chat template closes answers with an end token."
    )


def begin_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The token that begins every sample; None where there is none, or the chat template writes its own."""
    return None if template == "chat" else tokenizer.bos_token_id


def encode_segments(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, starts: Sequence[int] = ()
) -> TokenisedSample:
    """Tokenise segments.

    Args:
        segments: segments in order.
        tokenizer: fast tokenizer.
        starts: position of each segment in a text, if the tokens' spans in it are wanted.
    """
    encoder = text_encoder(tokenizer, len(tokenizer))
    sample = TokenisedSample([], [])
    previous: Segment | None = None
    for number, segment in enumerate(segments):
        turns_of_segment: list[int] = []
        spans: Sequence[Span] = ()
        if isinstance(segment, Text):
            ids, spans = encoder.encode(segment.text, after_special=isinstance(previous, EndOfSequence | SpecialToken))
            is_answer = _overlaps(spans, segment.answers)
            turns_of_segment = _turns(spans, segment.questions)
        elif isinstance(segment, Image):
            ids, is_answer = [IMAGE_PLACE], [False]
            turns_of_segment = [segment.turn]
        elif isinstance(segment, SpecialToken):
            ids, is_answer = [encoder.token_id(segment.token)], [segment.is_answer]
        else:
            ids, is_answer = [end_id(tokenizer)], [True]
        sample.input_ids.extend(ids)
        sample.labels.extend(token if learnt else IGNORE_INDEX for token, learnt in zip(ids, is_answer, strict=True))
        sample.turns.extend(turns_of_segment or [0] * len(ids))
        if starts:
            spans = spans or [(0, len(segment.token) if isinstance(segment, SpecialToken) else 0)]
            sample.spans.extend((starts[number] + start, starts[number] + end) for start, end in spans)
        previous = segment
    return sample


def _turns(spans: list[Span], questions: dict[int, Span]) -> list[int]:
    """Return for each token the image turn whose words it overlaps; 0 if there is none."""
    if not questions:
        return [0] * len(spans)
    return [
        next((turn for turn, question in questions.items() if _overlaps([span], (question,))[0]), 0) for span in spans
    ]


def _overlaps(spans: list[Span], answers: tuple[Span, ...]) -> list[bool]:
    return [
        any(start < answer_end and end > answer_start for answer_start, answer_end in answers) for start, end in spans
    ]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends every answer; `SettingsError` when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise SettingsError("The tokenizer has no end token, which must close every answer: set its eos_token.")
    return tokenizer.eos_token_id
