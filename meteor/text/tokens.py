"""Token ids and labels of a sample: each segment is tokenised once, and labels come from character positions."""

import os
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE, IMAGE_PLACEHOLDER
from meteor.errors import SettingsError, TokenisationError
from meteor.home import expand_home
from meteor.model_files import require_whole
from meteor.optional import import_optional
from meteor.pretrained import local_model
from meteor.text.chat import special_pattern
from meteor.text.conversation import Conversation, Turn
from meteor.text.encoder import text_encoder
from meteor.text.prompt import split_special
from meteor.text.segments import EndOfSequence, Image, Segment, Span, SpecialToken, Text
from meteor.text.template import prompt_template, render

# Newline tokens in the vocabularies of SentencePiece with byte fallback, byte-level BPE, and plain text.
_NEWLINE_TOKENS = ("<0x0A>", "Ċ", "\n")


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
    """

    input_ids: list[int]
    labels: list[int]
    turns: list[int] = field(default_factory=list, compare=False)
    image_numbers: list[int] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class VisualTokens:
    """Token ids of an image in a prompt.

    Attributes:
        image_id: id of ``<image>``, at every visual slot.
        slice_id: id after a slice within a row.
        row_id: id after the last slice of a row.
    """

    image_id: int
    slice_id: int
    row_id: int


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer without running code of the model's repository, and give it the special token ``<image>``.

    If the tokenizer has no padding token, its end token (or unknown token) becomes the padding token in memory. Batches
    need an id for padding, and the attention mask hides it.

    Args:
        path: local folder, s3:// folder or hub id.

    Raises:
        SettingsError: the folder does not exist, has no tokenizer, or its tokenizer is not fast.
        MissingPackageError: the folder has only a SentencePiece model, and a package for its conversion is missing.
    """
    folder = expand_home(local_model(path))
    if not os.path.isdir(folder) and _looks_local(path):
        raise SettingsError(f"The tokenizer's folder {folder!r} does not exist: check the path of the language model.")
    if os.path.isdir(folder):
        require_whole(folder, setting="llm.path")
        _check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if os.path.isdir(folder) else path, trust_remote_code=False)
    # The tokenizers library raises plain Exception for a tokenizer.json that it cannot read.
    except Exception as error:
        raise SettingsError(
            f"No tokenizer can be loaded from {path!r}: {error} Give a folder with tokenizer.json or tokenizer.model, "
            f"or a name on the hub."
        ) from error
    if not tokenizer.is_fast:
        raise SettingsError(
            f"{path!r} has no fast tokenizer ({type(tokenizer).__name__}), and answers are located by its offsets."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None and tokenizer.unk_token is None:
            raise SettingsError(
                f"The tokenizer of {path!r} has no padding, end or unknown token: set one in its config."
            )
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    add_image_token(tokenizer)
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``<image>`` as a special token, which no text of a user can become; keep it if it is there."""
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)


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
    input_ids, labels, turns = _encode(segments, tokenizer)
    if (bos_id := begin_id(tokenizer, template)) is not None:
        input_ids.insert(0, bos_id)
        labels.insert(0, IGNORE_INDEX)
        turns.insert(0, 0)
    if for_generation:
        return TokenisedSample(input_ids, [IGNORE_INDEX] * len(input_ids), turns)
    if all(label == IGNORE_INDEX for label in labels):
        raise TokenisationError(f"Sample {sample_id!r} {no_answer(template)}")
    return TokenisedSample(input_ids, labels, turns)


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
    input_ids, _, turns = _encode(segments, tokenizer)
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


def find_visual_tokens(tokenizer: PreTrainedTokenizerBase) -> VisualTokens:
    """Return the ids of ``<image>``, "," and the newline byte: 32000, 29892 and 13 in Vicuna's vocabulary.

    The ids are looked up in the vocabulary, because ``tokenizer(",")`` would give the id of ``▁,`` in Vicuna's.

    Raises:
        SettingsError: the vocabulary lacks a comma, a newline token or ``<image>``.
    """
    vocabulary: Tokenizer = tokenizer.backend_tokenizer
    slice_id, image_id = vocabulary.token_to_id(","), vocabulary.token_to_id(IMAGE_PLACEHOLDER)
    newline_ids = [vocabulary.token_to_id(token) for token in _NEWLINE_TOKENS]
    row_id = next((found for found in newline_ids if found is not None), None)
    if slice_id is None or row_id is None:
        missing = "','" if slice_id is None else f"a newline (tried {', '.join(map(repr, _NEWLINE_TOKENS))})"
        raise SettingsError(
            f"The tokenizer's vocabulary has no token for {missing}, which separates slices and rows of slices: use a "
            "language model whose tokenizer has one."
        )
    if image_id is None:
        raise SettingsError(
            f"The tokenizer has no token {IMAGE_PLACEHOLDER!r}: load it with meteor.text.tokens.load_tokenizer."
        )
    return VisualTokens(image_id, slice_id, row_id)


def _encode(segments: list[Segment], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    encoder = text_encoder(tokenizer, len(tokenizer))
    input_ids: list[int] = []
    labels: list[int] = []
    turns: list[int] = []
    previous: Segment | None = None
    for segment in segments:
        turns_of_segment: list[int] = []
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
        input_ids += ids
        labels += [token if learnt else IGNORE_INDEX for token, learnt in zip(ids, is_answer, strict=True)]
        turns += turns_of_segment or [0] * len(ids)
        previous = segment
    return input_ids, labels, turns


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


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _check_folder(folder: str) -> None:
    names = os.listdir(folder)
    if "tokenizer.model" in names and "tokenizer.json" not in names:
        # If these packages are missing, transformers' own error misleadingly asks for tiktoken.
        needed_for = f"Reading the SentencePiece model in {folder!r}"
        import_optional("sentencepiece", needed_for=needed_for, install="pip install sentencepiece")
        import_optional("google.protobuf", needed_for=needed_for, install="pip install protobuf")
