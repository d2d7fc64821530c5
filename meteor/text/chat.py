"""Reading of a tokenizer's own chat template: its fixed text is found by rendering it around sentinels."""

import datetime
import re
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from meteor.errors import SettingsError, TokenisationError
from meteor.text.prompt import PromptTemplate, token_of

# The date in Llama 3's own templates. A template that asks for today's date would otherwise change the prompts every day.
_DATE = datetime.date(2024, 7, 26)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """Read the tokenizer's chat template.

    The template sees sentinels in the place of messages, so no text of a user passes through it. The text before an answer
    is taken from a rendered answer, not from the template's generation prompt: Qwen3, for example, writes an empty ``think``
    block before an answer and none into its generation prompt.

    Raises:
        SettingsError: the tokenizer has no chat template.
        TokenisationError: the template refuses a question with its answer, or loses or repeats a message.
    """
    if tokenizer.chat_template is None:
        raise SettingsError(
            "The template 'chat' uses the tokenizer's own chat template, and this tokenizer has none: "
            "use 'vicuna_v1', or a tokenizer with a chat_template."
        )
    return _read(tokenizer, len(tokenizer), str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _read(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, _template: str) -> PromptTemplate:
    pattern = special_pattern(tokenizer, vocabulary_size)
    opening, before_answer, after = _around(tokenizer, ["user", "assistant"])
    words = before_answer.rstrip(" ")
    closing, end_token, ending = _split_end(after, pattern)
    try:
        _, _, after_first, _, _ = _around(tokenizer, ["user", "assistant", "user", "assistant"])
        between = after_first
        first_closing, first_end, rest = _split_end(after_first, pattern)
        question_end = _split_end(before_answer, pattern)[1]
        if question_end == _beginning(opening, pattern, tokenizer):
            question_end = None
        if first_end is not None and first_end in (end_token, question_end):
            # Some templates end the last answer otherwise than those before it, which end as questions do (gpt-oss), or do
            # not end it at all. Here all end as the last one, if that has an end.
            between = rest
            if end_token is None:
                closing, end_token = first_closing, first_end
    except TokenisationError:
        between = None
    try:
        before_system, after_system, *_ = _around(tokenizer, ["system", "user", "assistant"])
        system = before_system, after_system
    except TokenisationError:
        system = None
    return PromptTemplate(
        opening, system, words, before_answer[len(words) :], closing, end_token, between, ending, pattern
    )


def _around(tokenizer: PreTrainedTokenizerBase, roles: list[str]) -> list[str]:
    """Return the template's own text before, between and after messages of these roles."""
    # Private-use characters occur in no template's own text, and trim filters keep them.
    sentinels = [f"\ue000{position}\ue001" for position in range(len(roles))]
    messages = [{"role": role, "content": sentinel} for role, sentinel in zip(roles, sentinels, strict=True)]
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=_with_fixed_date(tokenizer.get_chat_template()),
            # Answers of data sets come without a chain of thought.
            enable_thinking=False,
        )
    except TemplateError as error:
        raise TokenisationError(f"The tokenizer's chat template refuses roles {roles}: {error}.") from error
    assert isinstance(rendered, str)
    if re.findall("|".join(sentinels), rendered) != sentinels:
        raise TokenisationError(
            f"The tokenizer's chat template drops, repeats or reorders messages of roles {roles}, so the answers "
            f"cannot be located: use the template 'vicuna_v1', or a simpler chat_template."
        )
    return re.split("|".join(sentinels), rendered)


def _with_fixed_date(template: str) -> str:
    """Let a template's calls of ``strftime_now``, which give today's date, give `_DATE`."""
    formats = {found for _, found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
    if not formats:
        return template
    dates = {found: _DATE.strftime(found) for found in sorted(formats)}
    return f"{{%- macro strftime_now(format) -%}}{{{{- {dates}[format] -}}}}{{%- endmacro -%}}{template}"


def _split_end(after: str, pattern: re.Pattern[str]) -> tuple[str, str | None, str]:
    """Split the text after an answer into white space, the special token that ends the answer, and the rest."""
    match = pattern.search(after)
    if match is None or after[: match.start()].strip():
        return "", None, after
    return after[: match.start()], token_of(match), after[match.end() :]


def _beginning(opening: str, pattern: re.Pattern[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token with which messages begin, if there is one: the first that is not the beginning of text."""
    tokens = map(token_of, pattern.finditer(opening))
    return next((token for token in tokens if token != tokenizer.bos_token), None)


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
