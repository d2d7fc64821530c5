"""Vocabulary of the generated scenes: shapes, colours, words, places, image sizes."""

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 32, 38),
    "green": (26, 148, 62),
    "blue": (32, 74, 216),
    "yellow": (250, 222, 30),
    "purple": (142, 44, 178),
    "orange": (246, 130, 18),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
}
# All words have three letters, so that the width of a text does not reveal its word.
WORDS = ("cat", "dog", "sun", "map", "key", "box", "hat", "fly")
TEXT = "text"
MAX_COUNT = 4

# Widths and heights in pixels. With sub-images of 112 x 112 pixels all but the two smallest sizes are sliced, with
# 336 x 336 pixels those from 448 x 336 up. 1120 x 840 is larger than six slices of 336 x 336.
ORDINARY_SIZES = ((320, 240), (240, 320), (256, 256), (448, 336), (360, 480))
SMALL_SIZES = ((90, 80), (96, 120))
WIDE_SIZES = ((900, 220), (480, 160))
TALL_SIZES = ((200, 560), (150, 400))
LARGE_SIZES = ((640, 480), (1120, 840))
# Groups of sizes of the ten scenes in a deck.
SIZE_MIX = (ORDINARY_SIZES,) * 5 + (SMALL_SIZES, WIDE_SIZES, WIDE_SIZES, TALL_SIZES, LARGE_SIZES)

CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left", "right")
ENDS = ("top", "bottom")
# From this ratio an image counts as wide (or tall), and questions about places name only halves along its length.
STRIP_RATIO = 2.0


def places_of(width: int, height: int) -> tuple[str, ...]:
    """Name the parts of an image of this size: four corners, or two halves of a long strip."""
    if width >= STRIP_RATIO * height:
        return SIDES
    if height >= STRIP_RATIO * width:
        return ENDS
    return CORNERS


def place_bounds(place: str, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the part of the image that ``place`` names, as (x0, y0, x1, y1) in pixels."""
    x0 = width / 2 if "right" in place else 0
    x1 = width / 2 if "left" in place else width
    y0 = height / 2 if "bottom" in place else 0
    y1 = height / 2 if "top" in place else height
    return x0, y0, x1, y1
