"""Prompt templates: a conversation becomes segments of text, images and end tokens, with answers marked."""

from transformers import PreTrainedTokenizerBase

from meteor.errors import SettingsError, TokenisationError
from meteor.text.chat import render_chat
from meteor.text.conversation import Conversation
from meteor.text.segments import EndOfSequence, Image, Segment, SegmentWriter

TEMPLATES = ("plain", "vicuna_v1", "chat")

# FastChat's and LLaVA's conv_vicuna_v1, byte for byte, because Vicuna was tuned on these words.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
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
    if template == "vicuna_v1":
        return _render_vicuna(conversation)
    if template == "chat":
        if tokenizer is None:
            raise SettingsError("The template 'chat' needs the tokenizer whose chat template it uses.")
        return render_chat(conversation, tokenizer, for_generation=for_generation)
    raise SettingsError(f"Unknown template {template!r}; known: {', '.join(TEMPLATES)}.")


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


def _render_vicuna(conversation: Conversation) -> list[Segment]:
    writer = SegmentWriter()
    writer.text((VICUNA_SYSTEM if conversation.system is None else conversation.system) + " ")
    for turn in conversation.turns:
        if turn.role == "human":
            writer.text("USER: ")
            writer.question(turn.num_images, turn.text)
            writer.text(" ASSISTANT:")
        else:
            writer.text(" " + turn.text if turn.text else "", is_answer=True)
            writer.add(EndOfSequence())
    return writer.finish()
