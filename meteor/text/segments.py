"""Segments of a rendered prompt, and a writer that joins text and records the positions of answers."""

from dataclasses import dataclass, field

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """Text that is tokenised as a whole.

    Attributes:
        text: words without images or special tokens; a string that looks like a special token is ordinary text.
        answers: character spans [start, end) of ``text`` that become labels.
        questions: number of an image turn -> character span of its words after the images.
    """

    text: str
    answers: tuple[Span, ...] = ()
    questions: dict[int, Span] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Image:
    """Place of one image; ``turn`` is the number, from 1, of its turn among the turns with images."""

    turn: int = field(default=0, compare=False)


@dataclass(frozen=True)
class SpecialToken:
    """Special token that a chat template writes; it becomes a label if it closes an answer."""

    token: str
    is_answer: bool = False


@dataclass(frozen=True)
class EndOfSequence:
    """End token of the tokenizer after an answer; always a label."""


Segment = Text | Image | SpecialToken | EndOfSequence


class SegmentWriter:
    """Collector of segments; consecutive pieces of text become one ``Text``."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._text = ""
        self._answers: list[Span] = []
        self._questions: dict[int, Span] = {}
        self._turn = 0

    def text(self, text: str, *, is_answer: bool = False) -> None:
        if is_answer and text:
            self._answers.append((len(self._text), len(self._text) + len(text)))
        self._text += text

    def question(self, num_images: int, text: str) -> None:
        """Write a human turn: its images, then its text.

        Each image is followed by a newline, the last image only if text follows, because LLaVA strips the turn.
        """
        self._turn += num_images > 0
        for number in range(num_images):
            self.add(Image(self._turn))
            if text or number + 1 < num_images:
                self.text("\n")
        if num_images and text:
            self._questions[self._turn] = (len(self._text), len(self._text) + len(text))
        self.text(text)

    def add(self, segment: Segment) -> None:
        self._close_text()
        self._segments.append(segment)

    def finish(self) -> list[Segment]:
        self._close_text()
        return self._segments

    def _close_text(self) -> None:
        if self._text:
            self._segments.append(Text(self._text, tuple(self._answers), self._questions))
        self._text, self._answers, self._questions = "", [], {}
