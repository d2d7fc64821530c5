"""Chat templates of finished models: Jinja text that writes messages exactly as training did."""

from transformers import PreTrainedTokenizerBase

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.text.prompt import PromptTemplate
from meteor.text.template import prompt_template

# Images come first in their message, each followed by a newline, the last only if words follow (SegmentWriter.question).
_MESSAGE_MACRO = """\
{%- macro images_and_words(message) -%}
  {%- set found = namespace(images=0, words='') -%}
  {%- if message.content is string -%}
    {%- set found.images = message.content.split(IMAGE) | length - 1 -%}
    {%- set found.words = message.content.replace(IMAGE, '') -%}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type in ('image', 'image_url') -%}
        {%- set found.images = found.images + 1 -%}
      {%- elif part.type == 'text' -%}
        {%- set found.images = found.images + (part.text.split(IMAGE) | length) - 1 -%}
        {%- set found.words = found.words + part.text.replace(IMAGE, '') -%}
      {%- else -%}
        {{- raise_exception('This model reads text and images, and a message has a part of type ' + part.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if found.images -%}
    {%- set found.words = '' if IS_CAPTION else found.words.strip() -%}
  {%- endif -%}
  {%- for number in range(found.images) -%}
    {{- IMAGE -}}
    {%- if found.words or not (loop.last or IS_CAPTION) -%}{{- '\n' -}}{%- endif -%}
  {%- endfor -%}
  {{- found.words -}}
{%- endmacro -%}
"""
_CONVERSATION = """\
{%- set has_system = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if has_system and not TAKES_SYSTEM -%}
  {{- raise_exception('This model takes no system prompt') -}}
{%- elif turns | length > 2 and not TAKES_SEVERAL -%}
  {{- raise_exception('This model takes one question only') -}}
{%- endif -%}
{{- BOS + (BEFORE_SYSTEM + images_and_words(messages[0]) + AFTER_SYSTEM if has_system else OPENING) -}}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('Messages must alternate between user and assistant, and the user begins') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{- (BETWEEN if not loop.first else '') + images_and_words(message) -}}
    {{- BEFORE_ANSWER if not loop.last or add_generation_prompt else '' -}}
  {%- else -%}
    {%- set answer = images_and_words(message) -%}
    {%- generation -%}
      {{- (ANSWER_PREFIX + answer if answer else '') + CLOSING + END -}}
    {%- endgeneration -%}
    {{- ENDING if loop.last else '' -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_jinja(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a prompt template as a Jinja chat template for Hugging Face's ``apply_chat_template``.

    Messages may be text, in which ``<image>`` stands for an image, or lists of parts of type ``text`` and ``image``.

    Args:
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        tokenizer: tokenizer of the language model; ``chat`` reads its chat template.
    """
    is_caption = template == "plain"
    # A caption follows its image without any fixed text.
    prompt = PromptTemplate("", None, "", between=None) if is_caption else prompt_template(template, tokenizer)
    before_system, after_system = prompt.system or ("", "")
    values = {
        "IMAGE": IMAGE_PLACEHOLDER,
        "IS_CAPTION": is_caption,
        "TAKES_SYSTEM": prompt.system is not None,
        "TAKES_SEVERAL": prompt.between is not None,
        "BOS": "" if template == "chat" else tokenizer.bos_token or "",
        "OPENING": prompt.opening,
        "BEFORE_SYSTEM": before_system,
        "AFTER_SYSTEM": after_system,
        "BETWEEN": prompt.between or "",
        "BEFORE_ANSWER": prompt.before_answer,
        "ANSWER_PREFIX": prompt.answer_prefix,
        "CLOSING": prompt.closing,
        "END": prompt.end_token or tokenizer.eos_token or "",
        "ENDING": prompt.ending,
    }
    settings = "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in values.items())
    return settings + _MESSAGE_MACRO + _CONVERSATION


def _literal(value: str | bool) -> str:
    """Write a Jinja constant; the escapes of its strings are Python's."""
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"
