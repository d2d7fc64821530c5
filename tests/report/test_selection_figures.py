"""Images of a selection, checked pixel by pixel where it matters."""

import io

import numpy as np
import pytest
from PIL import Image

from meteor.report.selection_figures import _montage, dim, heat_figure, kept_figure


def test_dropped_patches_are_grey_and_dark_and_kept_ones_untouched():
    pixels = np.full((4, 6, 3), (200, 100, 0), dtype=np.uint8)
    dimmed = dim(pixels, np.array([[True, False, False], [False, False, True]]))
    np.testing.assert_array_equal(dimmed[:2, :2], pixels[:2, :2])
    np.testing.assert_array_equal(dimmed[2:, 4:], pixels[2:, 4:])
    dropped = np.concatenate([dimmed[:2, 2:].reshape(-1, 3), dimmed[2:, :4].reshape(-1, 3)])
    np.testing.assert_array_equal(dropped, np.full_like(dropped, 28))


def test_patches_cover_an_image_whose_sides_they_do_not_divide():
    pixels = np.full((10, 7, 3), 255, dtype=np.uint8)
    dimmed = dim(pixels, np.eye(3, dtype=bool))
    # Slow truth: pixel p of n lies in patch floor(p * 3 / n).
    expected = [[(row * 3 // 10) == (column * 3 // 7) for column in range(7)] for row in range(10)]
    np.testing.assert_array_equal(dimmed[..., 0] == 255, expected)


def test_slices_are_put_together_row_by_row(make_panel):
    plan = make_panel(1008, 672).plan
    assert plan.grid == (3, 2)
    maps = [np.full((2, 2), index) for index in range(6)]
    np.testing.assert_array_equal(_montage(maps, plan)[::2, ::2], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("size", [(640, 480), (336, 336), (1600, 120), (400, 100), (100, 700)])
def test_images_of_any_shape_are_drawn_within_the_page(make_panel, size):
    panel = make_panel(*size)
    for image in (kept_figure(panel, "kept"), heat_figure(panel, "heat")):
        assert 0 < image.width <= 900
        assert 0 < image.height <= 1100
        assert Image.open(io.BytesIO(image.png)).format == "PNG"


def test_a_selection_without_native_scores_has_one_heat_map_less(make_panel):
    assert "(visual, native, combined)" in heat_figure(make_panel(), "heat").alt
    assert "(visual, combined)" in heat_figure(make_panel(native=False), "heat").alt


def test_equal_scores_are_drawn(make_panel):
    panel = make_panel(336, 336)
    panel.sub_images[0].combined_scores[:] = 1 / panel.sub_images[0].combined_scores.size
    assert heat_figure(panel, "heat").png
