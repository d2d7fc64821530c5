"""Scenes from a seed: answers are dealt first, then objects are placed so that the answers are true."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from meteor.synthetic.deck import Deck
from meteor.synthetic.layout import Box, Wanted, place_all
from meteor.synthetic.vocabulary import (
    COLOURS,
    CORNERS,
    ENDS,
    MAX_COUNT,
    SHAPES,
    SIDES,
    SIZE_MIX,
    TEXT,
    WORDS,
    places_of,
)


@dataclass(frozen=True)
class SceneObject:
    """Object of a scene.

    Attributes:
        shape: name in ``SHAPES``, or ``"text"``.
        colour: name in ``COLOURS``.
        box: x0, y0, x1, y1 in pixels, x1 and y1 excluded.
        place: part of the image that contains the whole box; ``""`` for text.
        word: word of a text; ``""`` for shapes.
        font_px: font size of a text in pixels; 0 for shapes.
    """

    shape: str
    colour: str
    box: Box
    place: str = ""
    word: str = ""
    font_px: int = 0

    @property
    def name(self) -> str:
        """Colour and shape, for example ``"red circle"``."""
        return f"{self.colour} {self.shape}"

    @property
    def name_with_article(self) -> str:
        return f"an {self.name}" if self.colour.startswith("o") else f"a {self.name}"


@dataclass(frozen=True)
class Scene:
    """Content of an image, which ``drawing.draw`` renders and ``questions.ask`` asks about.

    Attributes:
        width, height: size of the image in pixels.
        objects: 1 to 4 shapes, then the text if there is any. The first object's shape is unique, and so is the colour of
            the second (or only) object, even compared to the text. Both "what colour is the <first shape>" and "what shape is
            the <second colour> thing" therefore have a single answer.
        texture_seed: seed of the background.
    """

    width: int
    height: int
    objects: tuple[SceneObject, ...]
    texture_seed: int

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        return tuple(thing for thing in self.objects if thing.shape != TEXT)

    @property
    def text(self) -> SceneObject | None:
        return next((thing for thing in self.objects if thing.shape == TEXT), None)

    @property
    def caption(self) -> str:
        """Caption, for example ``"a red circle at the top left and a blue star at the bottom right, with the text sun"``."""
        phrases = [f"{thing.name_with_article} {_preposition(thing.place)} {thing.place}" for thing in self.shapes]
        listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        return listed if self.text is None else f"{listed}, with the text {self.text.word}"

    def to_dict(self) -> dict[str, Any]:
        """Return size, caption and objects as JSON values for ``scenes.jsonl``."""
        objects = [asdict(thing) for thing in self.objects]
        return {"width": self.width, "height": self.height, "caption": self.caption, "objects": objects}


def _preposition(place: str) -> str:
    return "on the" if place in SIDES else "at the"


class SceneDealer:
    """Endless source of scenes whose answers are balanced for each question type, over any stretch of scenes.

    Args:
        rng: source of random numbers; scenes depend on its state and the other arguments only.
        size_mix: groups of (width, height) in pixels; groups are dealt evenly, and a size is drawn from its group.
        scale: smallest and largest extent of a shape, as share of the shorter side of an image's part.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        size_mix: tuple[tuple[tuple[int, int], ...], ...] = SIZE_MIX,
        scale: tuple[float, float] = (0.36, 0.72),
    ) -> None:
        self._rng = rng
        self._scale = scale
        self._sizes = Deck(size_mix, rng)
        self._colours = Deck(tuple(COLOURS), rng)
        self._shapes = Deck(SHAPES, rng)
        self._counts = Deck(tuple(range(1, MAX_COUNT + 1)), rng)
        self._places: dict[tuple[str, ...], Deck[str]] = {
            places: Deck(places, rng) for places in (CORNERS, SIDES, ENDS)
        }
        self._words = Deck(WORDS, rng)
        self._has_text = Deck((True, False), rng)

    def __iter__(self) -> Iterator[Scene]:
        while True:
            yield self.deal()

    def deal(self) -> Scene:
        sizes = self._sizes.deal()
        width, height = sizes[self._rng.integers(len(sizes))]
        word = self._words.deal() if self._has_text.deal() else ""
        place = self._places[places_of(width, height)].deal()
        wanted = self._shapes_wanted(place)
        if word:
            # The text must not have the second shape's colour, or "what shape is the white thing" would have two answers.
            ink = self._other(("black", "white"), wanted[min(1, len(wanted) - 1)].colour)
            wanted.append(Wanted(TEXT, ink, word=word))
        placed = place_all(self._rng, width, height, wanted, self._scale)
        objects = tuple(
            SceneObject(want.shape, want.colour, at.box, at.place, want.word, at.font_px)
            for want, at in zip(wanted, placed, strict=True)
        )
        return Scene(width, height, objects, texture_seed=int(self._rng.integers(2**31)))

    def _shapes_wanted(self, place: str) -> list[Wanted]:
        colour, shape = self._colours.deal(), self._shapes.deal()
        count = self._counts.deal()
        if count == 1:
            return [Wanted(shape, colour, place=place)]
        first = Wanted(self._other(SHAPES, shape), colour, place=place)
        second = Wanted(shape, self._other(tuple(COLOURS), colour))
        rest = [
            Wanted(self._other(SHAPES, first.shape), self._other(tuple(COLOURS), second.colour))
            for _ in range(count - 2)
        ]
        return [first, second, *rest]

    def _other(self, names: tuple[str, ...], excluded: str) -> str:
        remaining = [name for name in names if name != excluded]
        return remaining[self._rng.integers(len(remaining))]
