"""Questions about one scene, two scenes, or none; if there is an image, every answer needs it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meteor.synthetic.deck import Deck
from meteor.synthetic.scenes import Scene, SceneObject
from meteor.synthetic.vocabulary import ENDS, SHAPES, SIDES, WORDS, places_of

TWO_IMAGES = "two_images"
TEXT_ONLY = "text_only"

_COUNT = ("How many shapes are in the picture?", "How many shapes can you see?")
_COLOUR = ("What colour is the {shape}?", "Which colour does the {shape} have?")
_SHAPE = ("What shape is the {colour} thing?", "Which shape has the colour {colour}?")
_TEXT = ("What does the text say?", "Which word is written in the picture?")


@dataclass(frozen=True)
class Question:
    """Question with its only answer; scores are reported per ``type``."""

    type: str
    text: str
    answer: str


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask every question that fits the scene, in an order in which no question reveals a later answer.

    Text does not count as a shape. A scene without text has no question about text.
    """
    shapes = scene.shapes
    first, second = shapes[0], shapes[min(1, len(shapes) - 1)]
    questions = [
        Question("count", _one_of(_COUNT, rng), str(len(shapes))),
        Question("colour", _one_of(_COLOUR, rng).format(shape=first.shape), first.colour),
        Question("shape", _one_of(_SHAPE, rng).format(colour=second.colour), second.shape),
    ]
    if scene.text is not None:
        questions.append(Question("text", _one_of(_TEXT, rng), scene.text.word))
    return [*questions, Question("position", _position_text(scene, first), first.place)]


def ask_in_turns(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask the questions of one conversation; a lone object gives colour or shape, because each question names the other."""
    questions = ask(scene, rng)
    if len(scene.shapes) > 1:
        return questions
    dropped = ("colour", "shape")[rng.integers(2)]
    return [question for question in questions if question.type != dropped]


def _position_text(scene: Scene, thing: SceneObject) -> str:
    places = places_of(scene.width, scene.height)
    if places == SIDES:
        return f"Is the {thing.name} on the left or on the right?"
    if places == ENDS:
        return f"Is the {thing.name} at the top or at the bottom?"
    return f"In which corner is the {thing.name}?"


def _one_of(texts: tuple[str, ...], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


class PairDealer:
    """Endless source of questions about two scenes, as (index of the first, index of the second, question).

    Args:
        scenes: at least eight scenes of one ``SceneDealer``. Its decks then guarantee a pair for every question: different
            counts, a common shape (six scenes have at least two of the four shapes), and a shape in only one scene.
        rng: source of choices and answers.
    """

    def __init__(self, scenes: list[Scene], rng: np.random.Generator) -> None:
        self._scenes = scenes
        self._rng = rng
        self._forms = Deck(("which", "both", "more"), rng)
        self._order = Deck(("first", "second"), rng)
        self._more = Deck(("first", "second"), rng)
        self._both = Deck(("yes", "no"), rng)

    def __iter__(self) -> Iterator[tuple[int, int, Question]]:
        while True:
            yield self.deal()

    def deal(self) -> tuple[int, int, Question]:
        return {"which": self._which, "both": self._same_shape, "more": self._more_shapes}[self._forms.deal()]()

    def _which(self) -> tuple[int, int, Question]:
        answer = self._order.deal()
        while True:
            with_it, without = self._two()
            thing = self._scenes[with_it].shapes[0]
            if all(other.name != thing.name for other in self._scenes[without].shapes):
                break
        question = f"Which picture shows {thing.name_with_article}, the first or the second?"
        pair = (with_it, without) if answer == "first" else (without, with_it)
        return *pair, Question(TWO_IMAGES, question, answer)

    def _same_shape(self) -> tuple[int, int, Question]:
        answer = self._both.deal()
        while True:
            first, second = self._two()
            shape = SHAPES[self._rng.integers(len(SHAPES))]
            shows = [any(thing.shape == shape for thing in self._scenes[index].shapes) for index in (first, second)]
            if all(shows) == (answer == "yes") and any(shows):
                return first, second, Question(TWO_IMAGES, f"Do both pictures show a {shape}?", answer)

    def _more_shapes(self) -> tuple[int, int, Question]:
        answer = self._more.deal()
        while True:
            more, fewer = self._two()
            if len(self._scenes[more].shapes) > len(self._scenes[fewer].shapes):
                break
        question = "Which picture shows more shapes, the first or the second?"
        pair = (more, fewer) if answer == "first" else (fewer, more)
        return *pair, Question(TWO_IMAGES, question, answer)

    def _two(self) -> tuple[int, int]:
        first, second = self._rng.choice(len(self._scenes), size=2, replace=False)
        return int(first), int(second)


def ask_without_image(rng: np.random.Generator) -> Question:
    """Ask to copy a word or to add two numbers with a sum up to 9; drawing the sum first makes all sums equally likely."""
    if rng.integers(2):
        word = WORDS[rng.integers(len(WORDS))]
        return Question(TEXT_ONLY, f"Repeat the word {word}.", word)
    total = int(rng.integers(10))
    part = int(rng.integers(total + 1))
    return Question(TEXT_ONLY, f"What is {part} plus {total - part}?", str(total))
