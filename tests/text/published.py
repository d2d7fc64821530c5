"""Chat templates that write what the published templates of known models write, with the parts that tools need left out."""

from typing import NamedTuple


class Published(NamedTuple):
    """A chat template.

    Attributes:
        template: Jinja text.
        tokens: special tokens, the end token of the tokenizer first.
        prompt: prompt of the question "Q".
        after_answer: text after the answer, in training.
        end_token: token that ends an answer.
    """

    template: str
    tokens: tuple[str, ...]
    prompt: str
    after_answer: str
    end_token: str


_CHATML_BODY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role in ('user', 'system') -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' -}}
  {%- else -%}
    {%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}
    {%- if loop.index0 > ns.last -%}
      {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content -}}
    {%- else -%}
      {{- '<|im_start|>assistant\n' + content -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
_LLAMA_3 = """\
{{- bos_token -}}
{%- if DATED -%}
  {%- if not date_string is defined -%}
    {%- if strftime_now is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}
    {%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
  {%- endif -%}
  {%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
  {%- else -%}{%- set system = '' -%}{%- endif -%}
  {{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
_GEMMA = """\
{{- bos_token -}}
SYSTEM
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {%- set role = 'model' if m.role == 'assistant' else m.role -%}
  {{- '<start_of_turn>' + role + '\n' + (first if loop.first and first is defined else '') -}}
  {{- (m.content | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
_GEMMA_2_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
)
_GEMMA_3_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
)
_PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# The system prompt goes into the last question.
_MISTRAL = """\
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {%- set is_last = loop.last or (loop.index0 == messages | length - 2) -%}
    {{- '[INST] ' + (system + '\n\n' if is_last and system is defined else '') + m.content + '[/INST]' -}}
  {%- else -%}
    {{- ' ' + (m.content | trim) + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
_DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{- m.content -}}
  {%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
  {%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end▁of▁sentence|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}
"""
_VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'A chat. ' }}{% endif %}"
    "{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Phi-4-mini: end tokens after answers only, and the tokenizer's own end token after the last.
_PHI_4_MINI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Qwen3's models that always think: the prompt opens a block that trained answers close at once.
_QWEN3_THINKING = _QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
    "{{- '<think>\n' -}}",
)
# gpt-oss: answers in the channel "final"; the last one ends otherwise than those before; the system prompt has today's date.
_GPT_OSS = """\
{{- '<|start|>system<|message|>Current date: ' + strftime_now("%Y-%m-%d") + '\n\nReasoning: medium<|end|>' -}}
{%- if messages[0].role == 'system' -%}
  {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' -}}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<|start|>user<|message|>' + m.content + '<|end|>' -}}
  {%- elif loop.last and not add_generation_prompt -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}
  {%- else -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

PUBLISHED = {
    "vicuna": Published(_VICUNA, ("</s>",), "A chat. USER: Q ASSISTANT:", "</s>", "</s>"),
    "qwen 2.5": Published(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
        + _CHATML_BODY,
        ("<|im_end|>", "<|im_start|>"),
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "qwen 3": Published(
        _QWEN3,
        ("<|im_end|>", "<|im_start|>", "<think>", "</think>"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "smollm 2": Published(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
        + _CHATML_BODY,
        ("<|im_end|>", "<|im_start|>"),
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "llama 3": Published(
        _LLAMA_3.replace("DATED", "false"),
        ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "llama 3.2": Published(
        _LLAMA_3.replace("DATED", "true"),
        ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "gemma 2": Published(
        _GEMMA.replace("SYSTEM", _GEMMA_2_SYSTEM),
        ("<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        "<end_of_turn>",
    ),
    "gemma 3": Published(
        _GEMMA.replace("SYSTEM", _GEMMA_3_SYSTEM),
        ("<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        "<end_of_turn>",
    ),
    "phi 3": Published(
        _PHI_3,
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"),
        "<|user|>\nQ<|end|>\n<|assistant|>\n",
        "<|end|>\n<|endoftext|>",
        "<|end|>",
    ),
    "phi 4": Published(
        _PHI_4,
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"),
        "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "mistral": Published(_MISTRAL, ("</s>", "[INST]", "[/INST]"), "<s>[INST] Q[/INST]", "</s>", "</s>"),
    "deepseek r1": Published(
        _DEEPSEEK_R1,
        ("<|end▁of▁sentence|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
        "<s><|User|>Q<|Assistant|>",
        "<|end▁of▁sentence|>",
        "<|end▁of▁sentence|>",
    ),
    "phi 4 mini": Published(
        _PHI_4_MINI,
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        "<|user|>Q<|end|><|assistant|>",
        "<|end|><|endoftext|>",
        "<|end|>",
    ),
    "qwen 3 thinking": Published(
        _QWEN3_THINKING,
        ("<|im_end|>", "<|im_start|>", "<think>", "</think>"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>\n",
        "<|im_end|>",
    ),
    "gpt-oss": Published(
        _GPT_OSS,
        ("<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        "<|start|>system<|message|>Current date: 2024-07-26\n\nReasoning: medium<|end|>"
        "<|start|>user<|message|>Q<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
        "<|return|>",
    ),
}
