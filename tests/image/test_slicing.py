"""The slicing rule: cases worked by hand, properties that hold for every ordinary image, and a slow re-derivation."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.errors import BadImageError, SettingsError
from meteor.image.slicing import SlicePlan, check_aspect_ratio, plan_slices

MAX_ASPECT_RATIO = 24


@st.composite
def ordinary_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Widths and heights up to 6000 whose aspect ratio is not above 24:1, either way round."""
    longer = draw(st.integers(1, 6000))
    shorter = draw(st.integers(-(-longer // MAX_ASPECT_RATIO), longer))
    return draw(st.sampled_from([(longer, shorter), (shorter, longer)]))


def plan_slowly(width: int, height: int, max_slices: int) -> SlicePlan:
    """The rule again, with s = 336 and p = 14: whole patches are counted one by one, grids searched among all pairs."""

    def floor14(length: int) -> int:
        num_patches = 1
        while 14 * (num_patches + 1) <= length:
            num_patches += 1
        return 14 * num_patches

    def fit(w: int, h: int, upscale: bool) -> tuple[int, int]:
        if Fraction(w * h, 336 * 336) > 1 or upscale:
            r = w / h
            h = math.floor(336 / math.sqrt(r))
            w = math.floor(h * r)
        return floor14(w), floor14(h)

    multiple = min(math.ceil(Fraction(width * height, 336 * 336)), max_slices)
    if multiple <= 1:
        w, h = fit(width, height, upscale=True)
        return SlicePlan(None, (w, h), None, ((h // 14, w // 14),))

    best, best_error = None, math.inf
    for count in [multiple - 1, multiple, multiple + 1]:
        for columns in range(1, count + 1):
            for rows in range(1, count + 1):
                if columns * rows != count or count == 1 or count > max_slices:
                    continue
                error = math.fabs(math.log(width / height) - math.log(columns / rows))
                if error < best_error:
                    best, best_error = (columns, rows), error
    assert best is not None
    global_size = fit(width, height, upscale=False)
    cell = [max(math.floor(Fraction(side, n)) * n, n) // n for side, n in zip((width, height), best, strict=True)]
    slice_size = fit(cell[0], cell[1], upscale=True)
    sizes = [global_size] + [slice_size] * (best[0] * best[1])
    return SlicePlan(best, global_size, slice_size, tuple((h // 14, w // 14) for w, h in sizes))


def test_a_document_page_of_672x1008_gives_six_full_slices() -> None:
    plan = plan_slices(672, 1008)
    assert plan.grid == (2, 3)
    assert plan.slice_size == (336, 336)
    assert plan.global_size == (19 * 14, 29 * 14)
    assert plan.patch_grids == ((29, 19), *[(24, 24)] * 6)
    assert plan.num_sub_images == 7


def test_one_pixel_above_the_resolution_gives_two_slices() -> None:
    assert plan_slices(337, 336).grid == (2, 1)
    assert plan_slices(336, 337).grid == (1, 2)


def test_an_image_of_exactly_the_resolution_is_not_sliced() -> None:
    assert plan_slices(336, 336) == SlicePlan(None, (336, 336), None, ((24, 24),))


def test_an_image_of_640x480_gives_two_by_two_slices_and_a_global_view() -> None:
    plan = plan_slices(640, 480)
    assert plan.grid == (2, 2)
    assert plan.num_sub_images == 5


def test_on_an_exact_tie_the_first_grid_wins() -> None:
    # 1x2 and 2x1 have the same error ln 2, so the one with fewer columns, met first, is taken.
    assert plan_slices(400, 400).grid == (1, 2)


def test_on_a_large_square_the_last_bit_of_the_logarithm_decides() -> None:
    # |ln 1 - ln(2/3)| is one unit in the last place above |ln 1 - ln(3/2)|, so 3x2 wins although 2x3 is met first.
    assert plan_slices(1000, 1000).grid == (3, 2)


def test_a_strip_of_400x100_is_one_sub_image_of_12x48_patches() -> None:
    assert plan_slices(400, 100) == SlicePlan(None, (672, 168), None, ((12, 48),))


def test_a_strip_of_1200x300_gives_five_sub_images() -> None:
    plan = plan_slices(1200, 300)
    assert plan.grid == (4, 1)
    assert plan.patch_grids == ((12, 48), *[(24, 24)] * 4)


def test_a_slice_has_the_shape_of_whole_pixels_of_the_image() -> None:
    # 541 // 2 = 270, so the cell is 270x270: a square of 336. Halves of pixels
    # would give int(336 / sqrt(270.5 / 270)) = 335 rows, which are 23 patches and not 24.
    plan = plan_slices(541, 270)
    assert plan.grid == (2, 1)
    assert plan.slice_size == (336, 336)


def test_a_small_image_is_scaled_up() -> None:
    assert plan_slices(10, 10).global_size == (336, 336)


def test_the_global_view_of_a_sliced_image_is_scaled_down() -> None:
    assert plan_slices(4000, 4000).global_size == (336, 336)


@pytest.mark.parametrize(
    ("max_slices", "grid"), [(0, None), (1, None), (2, (1, 2)), (3, (1, 2)), (4, (2, 2)), (7, (3, 2)), (9, (3, 3))]
)
def test_the_cap_holds(max_slices: int, grid: tuple[int, int] | None) -> None:
    # By hand, for a large square: cap 3 tries 2 and 3, whose best error is ln 2 (first 1x2); cap 7 tries 6 and 7.
    assert plan_slices(3000, 3000, max_slices=max_slices).grid == grid


def test_another_resolution_and_patch_size_are_kept_to() -> None:
    plan = plan_slices(448, 448, resolution=224, patch_size=16)
    assert plan == SlicePlan((2, 2), (224, 224), (224, 224), ((14, 14),) * 5)


def test_extreme_shapes_give_the_nonsense_that_the_aspect_ratio_check_refuses() -> None:
    assert plan_slices(1, 5000).patch_grids == ((1697, 1),)
    assert plan_slices(200_000, 1).patch_grids[0] == (1, 1)


@settings(max_examples=1000, deadline=None)
@given(ordinary_sizes(), st.integers(0, 9))
def test_the_plan_equals_the_slow_re_derivation(size: tuple[int, int], max_slices: int) -> None:
    assert plan_slices(*size, max_slices=max_slices) == plan_slowly(*size, max_slices)


@settings(deadline=None)
@given(ordinary_sizes())
def test_an_ordinary_image_stays_within_the_encoder(size: tuple[int, int]) -> None:
    plan = plan_slices(*size)
    assert 1 <= plan.num_sub_images <= 7
    assert all(1 <= rows * columns <= 576 for rows, columns in plan.patch_grids)


@settings(deadline=None)
@given(ordinary_sizes())
def test_sizes_are_whole_patches_and_agree_with_the_patch_grids(size: tuple[int, int]) -> None:
    plan = plan_slices(*size)
    sizes = [plan.global_size] + [plan.slice_size] * (plan.num_sub_images - 1)
    assert [(rows * 14, columns * 14) for rows, columns in plan.patch_grids] == [(h, w) for w, h in sizes]


@settings(deadline=None)
@given(ordinary_sizes())
def test_the_slices_fill_the_grid_and_there_is_one_exactly_when_the_image_is_larger_than_the_resolution(
    size: tuple[int, int],
) -> None:
    plan = plan_slices(*size)
    assert (plan.grid is not None) == (size[0] * size[1] > 336**2) == (plan.slice_size is not None)
    columns, rows = plan.grid or (0, 0)
    assert plan.num_sub_images - 1 == columns * rows != 1


@settings(deadline=None)
@given(ordinary_sizes())
def test_the_slices_keep_the_shape_of_the_image_within_a_patch(size: tuple[int, int]) -> None:
    plan = plan_slices(*size)
    if plan.grid is None or plan.slice_size is None:
        return
    cell_ratio = (size[0] // plan.grid[0]) / (size[1] // plan.grid[1])
    width, height = plan.slice_size
    # Sides before flooring lie in [side, side + 14), and the width was computed from a height cut by less than a pixel.
    assert width / (height + 14) < cell_ratio < (width + 15) / height


def test_numpy_integers_do_not_overflow() -> None:
    assert plan_slices(np.int32(60_000), np.int32(50_000)) == plan_slices(60_000, 50_000)


def test_a_plan_is_a_value_that_travels_between_processes() -> None:
    plan = plan_slices(640, 480)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(plan) == hash(plan_slices(640, 480))


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (10.0, 10), ("10", 10), (True, 10), (None, 10)])
def test_a_size_that_is_no_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(width|height) is .*whole number of pixels"):
        plan_slices(*size)


@pytest.mark.parametrize(
    "arguments", [{"max_slices": -1}, {"max_slices": 6.0}, {"resolution": 13}, {"patch_size": 0}, {"patch_size": None}]
)
def test_settings_out_of_range_are_refused_by_name(arguments: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        plan_slices(640, 480, **arguments)


@pytest.mark.parametrize("size", [(2400, 100), (100, 2400), (1, 1)])
def test_a_ratio_up_to_the_limit_is_accepted(size: tuple[int, int]) -> None:
    check_aspect_ratio(*size, MAX_ASPECT_RATIO)


@pytest.mark.parametrize("size", [(2401, 100), (100, 2401), (1, 5000), (200_000, 1)])
def test_a_ratio_above_the_limit_is_a_bad_image_either_way_round(size: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match=f"{size[0]}x{size[1]}") as caught:
        check_aspect_ratio(*size, MAX_ASPECT_RATIO)
    assert caught.value.reason == "aspect_ratio"


@pytest.mark.parametrize("limit", [0.5, math.nan])
def test_an_impossible_limit_on_the_ratio_is_refused(limit: float) -> None:
    with pytest.raises(SettingsError, match="max_aspect_ratio"):
        check_aspect_ratio(10, 10, limit)
