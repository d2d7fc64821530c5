"""Training images of the tiny CLIP: whole scenes and crops on several patch grids, with captions of their content."""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from meteor.synthetic.drawing import draw
from meteor.synthetic.layout import Box
from meteor.synthetic.scenes import Scene, SceneDealer
from meteor.synthetic.streams import random_stream
from meteor.synthetic.vocabulary import TEXT, place_bounds, places_of

PATCH_SIZE = 14
# Rows and columns of about the patch grids that slicing at 112 x 112 pixels gives for the images of a data set.
PATCH_GRIDS = ((8, 8), (6, 10), (10, 6), (4, 12), (12, 4), (7, 9))
# A crop is cut from a scene this many times larger, so that objects appear enlarged and cut off, as in slices.
_ZOOMS = (1.3, 1.6, 2.0)
_SCALE = (0.4, 0.85)
_VISIBLE_SHARE = {"shape": 0.5, "text": 0.9}


@dataclass(frozen=True)
class Views:
    """Images of one patch grid.

    Attributes:
        pixels: pixels of N views, (N, 14 * rows, 14 * columns, 3) uint8.
        scenes: content of each view, with boxes and places relative to the view.
    """

    pixels: np.ndarray
    scenes: tuple[Scene, ...]


def make_views(grid: tuple[int, int], num_views: int, seed: int, split: str) -> Views:
    """Draw ``num_views`` views of ``grid`` = (rows, columns) patches, half of them crops."""
    height, width = (PATCH_SIZE * side for side in grid)
    rng = random_stream(seed, f"{split} views", index=height * 1000 + width)
    whole_sizes = (((width, height),),)
    large_sizes = tuple(((round(width * zoom), round(height * zoom)),) for zoom in _ZOOMS)
    whole = list(islice(SceneDealer(rng, size_mix=whole_sizes, scale=_SCALE), num_views - num_views // 2))
    pixels, scenes = [np.asarray(draw(scene)) for scene in whole], whole
    large = SceneDealer(rng, size_mix=large_sizes, scale=_SCALE)
    while len(scenes) < num_views:
        scene = large.deal()
        x0, y0 = int(rng.integers(scene.width - width + 1)), int(rng.integers(scene.height - height + 1))
        cropped = crop(scene, (x0, y0, x0 + width, y0 + height))
        if cropped.shapes:
            pixels.append(np.asarray(draw(scene))[y0 : y0 + height, x0 : x0 + width])
            scenes.append(cropped)
    return Views(np.stack(pixels), tuple(scenes))


def crop(scene: Scene, window: Box) -> Scene:
    """Cut a window out of a scene, with shapes that are at least half visible and texts that are nearly whole."""
    x0, y0, x1, y1 = window
    width, height = x1 - x0, y1 - y0
    objects = []
    for thing in scene.objects:
        left, right = (min(max(x - x0, 0), width) for x in (thing.box[0], thing.box[2]))
        top, bottom = (min(max(y - y0, 0), height) for y in (thing.box[1], thing.box[3]))
        visible_share = (right - left) * (bottom - top) / box_area(thing.box)
        if visible_share < _VISIBLE_SHARE["text" if thing.shape == TEXT else "shape"]:
            continue
        place = "" if thing.shape == TEXT else _place_at((left + right) / 2, (top + bottom) / 2, width, height)
        objects.append(replace(thing, box=(left, top, right, bottom), place=place))
    return Scene(width, height, tuple(objects), scene.texture_seed)


def box_area(box: Box) -> int:
    """Return the area of a box in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def _place_at(x: float, y: float, width: int, height: int) -> str:
    for place in places_of(width, height):
        x0, y0, x1, y1 = place_bounds(place, width, height)
        if x0 <= x <= x1 and y0 <= y <= y1:
            return place
    raise AssertionError(f"({x}, {y}) lies outside {width} x {height}")
