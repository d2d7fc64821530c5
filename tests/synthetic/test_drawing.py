"""Drawn images show what the scene says, where it says so."""

import numpy as np
import pytest

from meteor.synthetic.drawing import draw, draw_background
from meteor.synthetic.scenes import Scene
from meteor.synthetic.vocabulary import COLOURS, SHAPES


def inside(scene: Scene, margin: int = 0) -> np.ndarray:
    """(height, width) bool: covered by any box."""
    covered = np.zeros((scene.height, scene.width), dtype=bool)
    for x0, y0, x1, y1 in (thing.box for thing in scene.objects):
        covered[y0 - margin : y1 + margin, x0 - margin : x1 + margin] = True
    return covered


def test_the_same_scene_gives_the_same_pixels(scenes: list[Scene]) -> None:
    assert np.array_equal(np.asarray(draw(scenes[0])), np.asarray(draw(scenes[0])))


def test_outside_the_boxes_there_is_only_background(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        image = np.asarray(draw(scene))
        background = draw_background(scene.width, scene.height, scene.texture_seed)
        assert image.shape == (scene.height, scene.width, 3)
        assert np.array_equal(image[~inside(scene)], background[~inside(scene)])


def test_the_centre_of_a_shape_has_its_colour(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        image = np.asarray(draw(scene))
        for thing in scene.shapes:
            x, y = (thing.box[0] + thing.box[2]) // 2, (thing.box[1] + thing.box[3]) // 2
            assert tuple(image[y, x]) == COLOURS[thing.colour]


def test_a_shape_touches_all_four_sides_of_its_box(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        image = np.asarray(draw(scene)).astype(int)
        background = draw_background(scene.width, scene.height, scene.texture_seed)
        changed = np.abs(image - background).max(axis=-1) > 0
        for x0, y0, x1, y1 in (thing.box for thing in scene.shapes):
            part = changed[y0:y1, x0:x1]
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()


def test_a_text_fills_its_box_and_is_not_cut_off(scenes: list[Scene]) -> None:
    texts = [(scene, scene.text) for scene in scenes if scene.text][:30]
    assert texts
    for scene, text in texts:
        image = np.asarray(draw(scene)).astype(int)
        ink = np.abs(image - draw_background(scene.width, scene.height, scene.texture_seed)).max(axis=-1) > 40
        x0, y0, x1, y1 = text.box
        rows, columns = ink[y0:y1, x0:x1].any(axis=1), ink[y0:y1, x0:x1].any(axis=0)
        assert rows.mean() > 0.8
        assert columns.mean() > 0.7
        assert columns[:2].any()
        assert columns[-2:].any()


@pytest.mark.parametrize("seed", range(20))
def test_every_colour_stands_out_from_every_background(seed: int) -> None:
    pixels = draw_background(64, 48, seed).reshape(-1, 1, 3).astype(float)
    colours = np.array(list(COLOURS.values()), dtype=float)
    assert np.linalg.norm(pixels - colours, axis=-1).min() > 60


def test_colours_are_far_from_each_other() -> None:
    colours = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 80


def test_shapes_cover_different_shares_of_their_boxes(scenes: list[Scene]) -> None:
    expected = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
    seen = {shape: [] for shape in SHAPES}
    for scene in scenes:
        image = np.asarray(draw(scene))
        for thing in scene.shapes:
            x0, y0, x1, y1 = thing.box
            if x1 - x0 >= 40:
                seen[thing.shape].append((image[y0:y1, x0:x1] == COLOURS[thing.colour]).all(axis=-1).mean())
    for shape, share in expected.items():
        assert np.mean(seen[shape]) == pytest.approx(share, abs=0.05)
    assert 0.2 < np.mean(seen["star"]) < 0.45
