"""Sub-image pixels: slices reassemble, the order is row by row, and normalising equals the formula."""

import numpy as np
import pytest
import torch
from PIL import Image

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.image.slicing import plan_slices
from meteor.image.transform import normalise, normalise_batch, slice_image


def make_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_quadrants(width: int, height: int, colours: list[tuple[int, int, int]]) -> Image.Image:
    """Four flat colours: top left, top right, bottom left, bottom right."""
    return Image.fromarray(np.array(colours, dtype=np.uint8).reshape(2, 2, 3)).resize((width, height), Image.NEAREST)


@pytest.mark.parametrize("size", [(640, 480), (672, 1008), (1200, 300), (337, 336), (901, 1377)])
def test_the_slices_reassemble_to_the_resized_image(size: tuple[int, int]) -> None:
    image, plan = make_image(*size), plan_slices(*size)
    _, *slices = slice_image(image, plan)
    columns, rows = plan.grid
    whole = image.resize((plan.slice_size[0] * columns, plan.slice_size[1] * rows), Image.Resampling.BICUBIC)
    reassembled = np.vstack([np.hstack(slices[row * columns : (row + 1) * columns]) for row in range(rows)])
    np.testing.assert_array_equal(reassembled, np.asarray(whole))


def test_the_global_view_comes_first_then_the_slices_row_by_row() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]
    global_view, *slices = slice_image(make_quadrants(640, 480, colours), plan_slices(640, 480))
    assert [tuple(int(value) for value in piece[50, 50]) for piece in slices] == colours
    assert [tuple(int(value) for value in global_view[y, x]) for y in (50, -50) for x in (50, -50)] == colours


@pytest.mark.parametrize("size", [(640, 480), (400, 100), (7, 5)])
def test_sub_images_have_the_sizes_of_the_plan(size: tuple[int, int]) -> None:
    plan = plan_slices(*size)
    sub_images = slice_image(make_image(*size), plan)
    assert [piece.shape for piece in sub_images] == [(rows * 14, columns * 14, 3) for rows, columns in plan.patch_grids]
    assert all(piece.dtype == np.uint8 and piece.flags.c_contiguous and piece.flags.writeable for piece in sub_images)


def test_an_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'RGBA'.*decode_image"):
        slice_image(make_image(20, 20).convert("RGBA"), plan_slices(20, 20))


def test_normalising_equals_the_formula_pixel_by_pixel() -> None:
    pixels = np.asarray(make_image(5, 4))
    tensor = normalise(pixels, CLIP_MEAN, CLIP_STD)
    for y in range(4):
        for x in range(5):
            for channel in range(3):
                expected = (pixels[y, x, channel] / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
                assert float(tensor[channel, y, x]) == pytest.approx(expected, abs=1e-6)


def test_the_normalised_tensor_is_float32_contiguous_and_leaves_read_only_pixels_alone() -> None:
    pixels = np.asarray(make_image(28, 14))
    before = pixels.copy()
    pixels.flags.writeable = False
    tensor = normalise(pixels, CLIP_MEAN, CLIP_STD)
    tensor.zero_()
    assert tensor.shape == (3, 14, 28)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    "pixels", [np.zeros((3, 4, 5), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32)]
)
def test_pixels_of_another_layout_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 of shape"):
        normalise(pixels, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (1, 1, 1)), ((0, 0, 0), (1, 1)), ((0, 0, 0), (1, 0, 1))])
def test_a_mean_or_std_that_is_not_three_usable_numbers_is_refused(mean: tuple, std: tuple) -> None:
    with pytest.raises(ValueError, match="three numbers"):
        normalise(np.zeros((4, 5, 3), np.uint8), mean, std)


def test_a_batch_is_normalised_to_the_bits_of_float32_arithmetic_pixel_by_pixel() -> None:
    # All 256 values in all three channels; numpy's float32 operations are the truth.
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    others = np.asarray(make_image(28, 14))
    truths = [
        (one.astype(np.float32) / np.float32(255) - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
        for one in (values, others)
    ]
    for tensor, truth in zip(normalise_batch([values, others], CLIP_MEAN, CLIP_STD), truths, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), truth.transpose(2, 0, 1))
    assert torch.equal(normalise(values, CLIP_MEAN, CLIP_STD), normalise_batch([values], CLIP_MEAN, CLIP_STD)[0])


def test_a_batch_is_cast_after_normalising() -> None:
    pixels = np.asarray(make_image(28, 14))
    (half,) = normalise_batch([pixels], CLIP_MEAN, CLIP_STD, dtype=torch.bfloat16)
    assert torch.equal(half, normalise(pixels, CLIP_MEAN, CLIP_STD).bfloat16())


def test_an_empty_batch_is_fine() -> None:
    assert normalise_batch([], CLIP_MEAN, CLIP_STD) == []
