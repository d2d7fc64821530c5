"""Prompt templates by name: a conversation becomes segments of text, images and end tokens, with answers marked."""

from transformers import PreTrainedTokenizerBase

from meteor.errors import SettingsError, TokenisationError
from meteor.text.chat import chat_template
from meteor.text.conversation import Conversation
from meteor.text.prompt import PromptTemplate
from meteor.text.segments import EndOfSequence, Image, Segment, SegmentWriter

TEMPLATES = ("plain", "vicuna_v1", "chat")

# FastChat's and LLaVA's conv_vicuna_v1, byte for byte, because Vicuna was tuned on these words.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VICUNA = PromptTemplate(
    opening=f"{VICUNA_SYSTEM} USER: ",
    system=("", " USER: "),
    before_answer=" ASSISTANT:",
    answer_prefix=" ",
    between="USER: ",
)


def render(
    conversation: Conversation,
    template: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    for_generation: bool = False,
) -> list[Segment]:
    """Render a conversation as segments.

    - ``plain`` (stage 1): images, caption, end token. The human's words are dropped, as in LLaVA. LLaVA ends a caption with
      a newline; here it ends with the tokenizer's end token, so that a model knows when to stop after stage 1 alone.
    - ``vicuna_v1`` (stage 2): ``SYSTEM USER: <image>\\nQUESTION ASSISTANT: ANSWER</s>USER: ...``. The space before an
      answer belongs to the answer, because generation starts after ``ASSISTANT:``. An empty answer has no space.
    - ``chat``: the tokenizer's own chat template.

    Args:
        conversation: the turns.
        template: ``plain``, ``vicuna_v1`` or ``chat``.
        tokenizer: tokenizer with a chat template; needed by ``chat`` only.
        for_generation: whether to stop where the last answer begins; an answer in the last turn is left out.

    Raises:
        SettingsError: the template is unknown, or ``chat`` has no tokenizer with a chat template.
        TokenisationError: the conversation does not fit the template.
    """
    if for_generation and conversation.turns and conversation.turns[-1].role == "gpt":
        conversation = Conversation(conversation.turns[:-1], conversation.system)
    if template == "plain":
        return _render_plain(conversation, for_generation)
    return prompt_template(template, tokenizer).render(conversation, for_generation=for_generation)


def prompt_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptTemplate:
    """Return the fixed text of ``vicuna_v1``, or of ``chat`` for this tokenizer.

    Raises:
        SettingsError: the template is unknown, or ``chat`` has no tokenizer with a chat template.
        TokenisationError: the tokenizer's chat template loses or repeats messages.
    """
    if name == "vicuna_v1":
        return _VICUNA
    if name != "chat":
        raise SettingsError(f"Unknown template {name!r}; known: {', '.join(TEMPLATES)}.")
    if tokenizer is None:
        raise SettingsError("The template 'chat' needs the tokenizer whose chat template it uses.")
    return chat_template(tokenizer)


def end_token(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that ends an answer in training, at which generation must end."""
    own = None if name == "plain" else prompt_template(name, tokenizer).end_token
    return own or tokenizer.eos_token


def _render_plain(conversation: Conversation, for_generation: bool) -> list[Segment]:
    roles = [turn.role for turn in conversation.turns]
    if roles != (["human"] if for_generation else ["human", "gpt"]) or conversation.num_images == 0:
        raise TokenisationError(
            f"The template 'plain' takes one human turn with an image and one caption, but got turns {roles} with "
            f"{conversation.num_images} images: use 'vicuna_v1' for dialogues and text-only samples."
        )
    writer = SegmentWriter()
    for _ in range(conversation.num_images):
        writer.add(Image())
    if not for_generation:
        writer.text(conversation.turns[1].text, is_answer=True)
        writer.add(EndOfSequence())
    return writer.finish()
