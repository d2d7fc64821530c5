"""The pieces a rendered prompt is made of, and the writer that joins text while it remembers where the answers are."""

from dataclasses import dataclass, field

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """Text that is tokenised in one go.

    Attributes:
        text: never contains an image or a special token; what looks like one is text.
        answers: character spans [start, end) of ``text`` that are labels.
        questions: image turn -> the span of what it says after its images.
    """

    text: str
    answers: tuple[Span, ...] = ()
    questions: dict[int, Span] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Image:
    """The place of one image; ``turn`` counts the turns that have images, from 1."""

    turn: int = field(default=0, compare=False)


@dataclass(frozen=True)
class SpecialToken:
    """A special token that a chat template writes; a label where it closes an answer."""

    token: str
    is_answer: bool = False


@dataclass(frozen=True)
class EndOfSequence:
    """The tokenizer's end token after an answer; always a label."""


Segment = Text | Image | SpecialToken | EndOfSequence


class SegmentWriter:
    """Collects segments; text written piece by piece becomes one ``Text`` until something else comes."""

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
        """What a human says: images in a row, each followed by a newline, the last one only if text follows (LLaVA strips
        the turn); then the text."""
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
