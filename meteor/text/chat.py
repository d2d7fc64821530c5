"""Rendering of the tokenizer's own chat template around sentinels, so that no user text passes through the template."""

import re
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from meteor.errors import SettingsError, TokenisationError
from meteor.text.conversation import Conversation, Turn
from meteor.text.segments import Segment, SegmentWriter, SpecialToken

_ROLES = {"human": "user", "gpt": "assistant"}


def render_chat(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, for_generation: bool = False
) -> list[Segment]:
    """Render a conversation through ``tokenizer.apply_chat_template``.

    The template sees a sentinel instead of each message; the words are inserted afterwards, unchanged. Special tokens
    therefore come from the template only, never from the user, and the position of each answer is known without a search.

    Spaces directly before an answer belong to the answer, because they fuse with its first token. The special token that
    closes an answer belongs to it too, if the template closes the last answer with a special token.

    Args:
        conversation: the turns.
        tokenizer: tokenizer with a chat template.
        for_generation: whether to stop where the next answer begins.

    Returns:
        Segments of text, images and special tokens in order.

    Raises:
        SettingsError: the tokenizer has no chat template.
        TokenisationError: the template refuses the conversation, or loses or repeats a message.
    """
    literals = _literals(conversation, tokenizer, for_generation)
    pattern = special_pattern(tokenizer, len(tokenizer))
    closing = None if for_generation else _closing_token(literals[-1], pattern)
    writer = SegmentWriter()
    pending = literals[0]
    if conversation.system is not None:
        _write_literal(writer, pending, pattern)
        writer.text(conversation.system)
        pending = literals[1]
    for turn, after in zip(conversation.turns, literals[-len(conversation.turns) :], strict=True):
        if turn.role == "human":
            _write_literal(writer, pending, pattern)
            writer.question(turn.num_images, turn.text)
            pending = after
        else:
            pending = _write_answer(writer, pending, turn, after, pattern, closing)
    _write_literal(writer, pending, pattern)
    return writer.finish()


@lru_cache(maxsize=8)
def special_pattern(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> re.Pattern[str]:
    """Compile a pattern for every added token of the tokenizer and the white space that it absorbs (``lstrip``, ``rstrip``).

    Args:
        tokenizer: tokenizer with the added tokens.
        vocabulary_size: ``len(tokenizer)``, part of the cache's key: a tokenizer with new tokens gets a new pattern.
    """
    # Longer tokens come first: a token that begins with another one must not be matched as the shorter token.
    tokens = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
    if not tokens:
        # An empty alternation would match everywhere; this pattern matches nowhere.
        return re.compile(r"(?!)")
    return re.compile(
        "|".join(
            (r"\s*" if token.lstrip else "") + f"({re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in tokens
        )
    )


def _literals(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, for_generation: bool) -> list[str]:
    """Return the template's own text before, between and after the messages."""
    if tokenizer.chat_template is None:
        raise SettingsError(
            "The template 'chat' uses the tokenizer's own chat template, and this tokenizer has none: "
            "use 'vicuna_v1', or a tokenizer with a chat_template."
        )
    roles = [_ROLES[turn.role] for turn in conversation.turns]
    if conversation.system is not None:
        roles.insert(0, "system")
    # Private-use characters occur in no template's own text, and trim filters keep them.
    sentinels = [f"\ue000{position}\ue001" for position in range(len(roles))]
    messages = [{"role": role, "content": sentinel} for role, sentinel in zip(roles, sentinels, strict=True)]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation)
    except TemplateError as error:
        raise TokenisationError(f"The tokenizer's chat template refuses roles {roles}: {error}.") from error
    assert isinstance(rendered, str)
    pieces = re.split("|".join(sentinels), rendered)
    if re.findall("|".join(sentinels), rendered) != sentinels:
        raise TokenisationError(
            f"The tokenizer's chat template drops, repeats or reorders messages of roles {roles}, so the answers "
            f"cannot be located: use the template 'vicuna_v1', or a simpler chat_template."
        )
    return pieces


def _write_answer(
    writer: SegmentWriter, before: str, turn: Turn, after: str, pattern: re.Pattern[str], closing: str | None
) -> str:
    """Write the literal before an answer, the answer and its closing token; return the rest of the literal after it."""
    spaces = before[len(before.rstrip(" ")) :] if turn.text else ""
    _write_literal(writer, before[: len(before) - len(spaces)], pattern)
    writer.text(spaces + turn.text, is_answer=True)
    if closing is None or _closing_token(after, pattern) != closing:
        return after
    match = pattern.search(after)
    assert match is not None
    writer.text(after[: match.start()], is_answer=True)
    writer.add(SpecialToken(closing, is_answer=True))
    return after[match.end() :]


def _write_literal(writer: SegmentWriter, literal: str, pattern: re.Pattern[str]) -> None:
    position = 0
    for match in pattern.finditer(literal):
        writer.text(literal[position : match.start()])
        writer.add(SpecialToken(_token_of(match)))
        position = match.end()
    writer.text(literal[position:])


def _closing_token(literal: str, pattern: re.Pattern[str]) -> str | None:
    """Return the special token at the start of a literal, white space ignored; None if there is none."""
    match = pattern.search(literal)
    return _token_of(match) if match is not None and not literal[: match.start()].strip() else None


def _token_of(match: re.Match[str]) -> str:
    return match[match.lastindex or 0]
