"""Prompt templates as data: the fixed text around a conversation's messages, equal in training and in answering."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from meteor.errors import TokenisationError
from meteor.text.conversation import Conversation, Turn
from meteor.text.segments import EndOfSequence, Segment, SegmentWriter, SpecialToken


@dataclass(frozen=True)
class PromptTemplate:
    """Fixed text before, between and after messages.

    Every answer of a conversation is written in one way, whatever its position. A prompt is therefore a prefix of the text
    that is trained on, by construction.

    Attributes:
        opening: text before the first question.
        system: text before and after a system prompt, which together replace ``opening``; None if the template takes none.
        before_answer: text between a question and its answer.
        answer_prefix: spaces before an answer, which belong to it because they fuse with its first token.
        closing: text that ends an answer, before its end token.
        end_token: special token after an answer, which is learnt; None for the tokenizer's own end token.
        between: text between an end token and the next question; None if the template takes one question only.
        ending: text after the last end token.
        special_tokens: pattern of the special tokens in these texts; None if the texts have none.
    """

    opening: str
    system: tuple[str, str] | None
    before_answer: str
    answer_prefix: str = ""
    closing: str = ""
    end_token: str | None = None
    between: str | None = ""
    ending: str = ""
    special_tokens: re.Pattern[str] | None = None

    def render(self, conversation: Conversation, *, for_generation: bool) -> list[Segment]:
        """Write a conversation as segments.

        Args:
            conversation: the turns; the last one is a question if ``for_generation``.
            for_generation: whether to stop where the next answer begins.

        Raises:
            TokenisationError: the template takes no system prompt, or one question only, and the conversation has more.
        """
        if self.between is None and len(conversation.turns) > 2:
            raise TokenisationError(
                "The tokenizer's chat template writes the messages of several questions in another order, so this "
                "conversation cannot be written: use the template 'vicuna_v1', or a simpler chat_template."
            )
        writer = SegmentWriter()
        self._open(writer, conversation.system)
        for position, turn in enumerate(conversation.turns):
            if turn.role == "gpt":
                self._answer(writer, turn)
                continue
            if position:
                self._fixed(writer, self.between or "")
            writer.question(turn.num_images, turn.text)
            self._fixed(writer, self.before_answer)
        if not for_generation:
            self._fixed(writer, self.ending)
        return writer.finish()

    def _open(self, writer: SegmentWriter, system: str | None) -> None:
        if system is None:
            self._fixed(writer, self.opening)
            return
        if self.system is None:
            raise TokenisationError(
                "The tokenizer's chat template takes no system prompt, and the conversation has one."
            )
        self._fixed(writer, self.system[0])
        writer.text(system)
        self._fixed(writer, self.system[1])

    def _answer(self, writer: SegmentWriter, turn: Turn) -> None:
        writer.text((self.answer_prefix + turn.text if turn.text else "") + self.closing, is_answer=True)
        writer.add(EndOfSequence() if self.end_token is None else SpecialToken(self.end_token, is_answer=True))

    def _fixed(self, writer: SegmentWriter, text: str) -> None:
        """Write text of the template, in which special tokens are special tokens."""
        for part in split_special(text, self.special_tokens):
            if isinstance(part, SpecialToken):
                writer.add(part)
            else:
                writer.text(part)


def split_special(text: str, special_tokens: re.Pattern[str] | None) -> Iterable[str | SpecialToken]:
    """Yield the parts of a text: special tokens, and the words before, between and after them."""
    position = 0
    for match in special_tokens.finditer(text) if special_tokens else ():
        yield text[position : match.start()]
        yield SpecialToken(token_of(match))
        position = match.end()
    yield text[position:]


def token_of(match: re.Match[str]) -> str:
    """Return the special token of a match, without the white space that it absorbs."""
    return match[match.lastindex or 0]
