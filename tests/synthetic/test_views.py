"""Views have the grid asked for and captions of what is left in them."""

import numpy as np
import pytest

from meteor.synthetic.scenes import Scene, SceneObject
from meteor.synthetic.views import PATCH_GRIDS, crop, make_views


def make_scene() -> Scene:
    things = (
        SceneObject("circle", "red", (10, 10, 30, 30), "top left"),
        SceneObject("star", "blue", (60, 50, 80, 70), "bottom right"),
        SceneObject("text", "black", (40, 5, 70, 15), word="sun", font_px=14),
    )
    return Scene(100, 80, things, 0)


def test_a_crop_moves_boxes_and_names_places_anew() -> None:
    cropped = crop(make_scene(), (0, 0, 100, 40))
    assert (cropped.width, cropped.height) == (100, 40)
    assert [(thing.box, thing.place) for thing in cropped.objects] == [
        ((10, 10, 30, 30), "left"),
        ((40, 5, 70, 15), ""),
    ]


def test_a_crop_keeps_a_shape_that_is_half_visible_and_drops_a_text_that_is_cut() -> None:
    cropped = crop(make_scene(), (20, 8, 90, 70))
    assert [(thing.shape, thing.box) for thing in cropped.objects] == [
        ("circle", (0, 2, 10, 22)),
        ("star", (40, 42, 60, 62)),
    ]
    assert [thing.shape for thing in crop(make_scene(), (21, 8, 90, 70)).objects] == ["star"]


@pytest.mark.parametrize("grid", PATCH_GRIDS)
def test_views_have_their_grids_pixels_and_something_to_say(grid: tuple[int, int]) -> None:
    views = make_views(grid, 6, 0, "test")
    assert views.pixels.shape == (6, 14 * grid[0], 14 * grid[1], 3)
    assert views.pixels.dtype == np.uint8
    assert all(scene.shapes for scene in views.scenes)
    assert {(scene.width, scene.height) for scene in views.scenes} == {(14 * grid[1], 14 * grid[0])}


def test_splits_and_seeds_give_different_views_and_the_same_arguments_the_same() -> None:
    first, again = make_views((8, 8), 4, 0, "train"), make_views((8, 8), 4, 0, "train")
    assert np.array_equal(first.pixels, again.pixels)
    assert first.scenes == again.scenes
    assert make_views((8, 8), 4, 0, "held-out").scenes != first.scenes
    assert make_views((8, 8), 4, 1, "train").scenes != first.scenes
