"""Layout of a scene: boxes inside the image, each within its named part, that do not touch each other."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import ImageFont

from meteor.errors import SettingsError
from meteor.synthetic.vocabulary import place_bounds, places_of

Box = tuple[int, int, int, int]

MIN_FONT_PX = 14
# Ratio of a text's font size to the extent of a shape in its place: the letters are then about two thirds as high.
_FONT_TO_SHAPE = 0.9
_NUM_LAYOUTS = 150
_NUM_TRIES_PER_THING = 30
_SHRINK = 0.985
# Free space around an object, as a share of the shorter side of an image's part.
_GAP_SHARE = 0.06


@dataclass(frozen=True)
class Wanted:
    """Object to be placed: a shape, or a text if ``word`` is not empty; an empty ``place`` allows any part."""

    shape: str
    colour: str
    place: str = ""
    word: str = ""


@dataclass(frozen=True)
class Placed:
    """Box of a placed object; a text has ``font_px`` and an empty ``place``."""

    box: Box
    place: str = ""
    font_px: int = 0


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's built-in scalable font."""
    loaded = ImageFont.load_default(size=size_px)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


@cache
def ink_box(word: str, size_px: int) -> Box:
    """Return the box of all pixels that the letters colour, however faintly, when drawn at (0, 0).

    ``getbbox`` would also include the pen's advance after the last letter, up to a tenth of the size.
    """
    mask, (left, top) = font(size_px).getmask2(word, mode="L")
    x0, y0, x1, y1 = mask.getbbox()
    return x0 + left, y0 + top, x1 + left, y1 + top


def place_all(
    rng: np.random.Generator, width: int, height: int, wanted: list[Wanted], scale: tuple[float, float]
) -> list[Placed]:
    """Place all objects in the given order.

    A layout that fails is discarded, and the next attempt uses slightly smaller objects.

    Args:
        rng: source of random numbers.
        width: width of the image in pixels.
        height: height of the image in pixels.
        wanted: objects to place.
        scale: smallest and largest extent of a shape, as share of the shorter side of an image's part.

    Raises:
        SettingsError: the image is too small for this many objects.
    """
    for attempt in range(_NUM_LAYOUTS):
        low, high = (bound * _SHRINK**attempt for bound in scale)
        layout = _try_layout(rng, width, height, wanted, (low, high))
        if layout is not None:
            return layout
    raise SettingsError(f"{len(wanted)} objects do not fit into {width} x {height} pixels; use a larger image.")


def _try_layout(
    rng: np.random.Generator, width: int, height: int, wanted: list[Wanted], scale: tuple[float, float]
) -> list[Placed] | None:
    x0, y0, x1, y1 = place_bounds(places_of(width, height)[0], width, height)
    unit = min(x1 - x0, y1 - y0)
    gap = max(2, round(_GAP_SHARE * unit))
    placed: list[Placed] = []
    for want in wanted:
        for _ in range(_NUM_TRIES_PER_THING):
            candidate = _place_once(rng, width, height, want, unit * rng.uniform(*scale), gap)
            if candidate and not any(_touch(candidate.box, other.box, gap) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def _place_once(
    rng: np.random.Generator, width: int, height: int, want: Wanted, extent: float, gap: int
) -> Placed | None:
    if want.word:
        return _place_text(rng, width, height, want.word, extent, gap)
    places = places_of(width, height)
    place = want.place or places[rng.integers(len(places))]
    return _place_shape(rng, place_bounds(place, width, height), round(extent), gap, place)


def _place_shape(
    rng: np.random.Generator, bounds: tuple[float, float, float, float], extent: int, gap: int, place: str
) -> Placed | None:
    corner = _random_corner(rng, bounds, extent, extent, gap)
    return corner and Placed((corner[0], corner[1], corner[0] + extent, corner[1] + extent), place)


def _place_text(rng: np.random.Generator, width: int, height: int, word: str, extent: float, gap: int) -> Placed | None:
    font_px = max(MIN_FONT_PX, round(extent * _FONT_TO_SHAPE))
    left, top, right, bottom = ink_box(word, font_px)
    ink_width, ink_height = right - left, bottom - top
    corner = _random_corner(rng, (0, 0, width, height), ink_width, ink_height, gap)
    return corner and Placed((corner[0], corner[1], corner[0] + ink_width, corner[1] + ink_height), font_px=font_px)


def _random_corner(
    rng: np.random.Generator, bounds: tuple[float, float, float, float], width: int, height: int, gap: int
) -> tuple[int, int] | None:
    """Draw the upper left corner of a box at least ``gap`` pixels within ``bounds``; None if the box cannot fit."""
    low_x, low_y = int(np.ceil(bounds[0])) + gap, int(np.ceil(bounds[1])) + gap
    high_x, high_y = int(bounds[2]) - gap - width, int(bounds[3]) - gap - height
    if high_x < low_x or high_y < low_y:
        return None
    return int(rng.integers(low_x, high_x + 1)), int(rng.integers(low_y, high_y + 1))


def _touch(box: Box, other: Box, gap: int) -> bool:
    return box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
