"""Attention inside boxes: coverage and scaling by hand, shares with an encoder whose attention is known."""

import numpy as np
import pytest
import torch

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.image.slicing import SlicePlan
from meteor.synthetic.attention import attention_in_boxes, patch_coverage, sub_image_boxes
from meteor.vision.encoder import SubImageFeatures


class KnownAttention:
    """An encoder that attends to the first patch with weight ``first`` and evenly to the others."""

    patch_size, mean, std = 14, CLIP_MEAN, CLIP_STD

    def __init__(self, first: float) -> None:
        self.first = first

    def encode(self, pixels: list[torch.Tensor]) -> list[SubImageFeatures]:
        return [self._encode_one(*(side // 14 for side in one.shape[1:])) for one in pixels]

    def _encode_one(self, rows: int, columns: int) -> SubImageFeatures:
        attention = torch.full((1, rows * columns), (1 - self.first) / (rows * columns - 1))
        attention[0, 0] = self.first
        # A class token keeps a part of its attention for itself.
        return SubImageFeatures(torch.zeros(rows * columns, 2), 0.7 * attention, torch.zeros(2), (rows, columns))


def make_images(count: int) -> list[np.ndarray]:
    return [np.zeros((28, 56, 3), dtype=np.uint8)] * count


def test_a_patch_counts_by_the_share_that_any_box_covers() -> None:
    coverage = patch_coverage(56, 28, [(0, 0, 14, 14), (7, 0, 21, 14), (28, 21, 56, 28)], 14)
    assert coverage.tolist() == [1, 0.5, 0, 0, 0, 0, 0.5, 0.5]


def test_even_attention_is_at_chance_and_pointed_attention_above() -> None:
    boxes = [[(0, 0, 14, 14)]] * 2
    even = attention_in_boxes(KnownAttention(1 / 8), make_images(2), boxes)
    assert even.chance == pytest.approx(1 / 8)
    assert even.ratio == pytest.approx(1)
    pointed = attention_in_boxes(KnownAttention(0.65), make_images(2), boxes)
    assert pointed.share == pytest.approx(0.65)
    assert pointed.ratio == pytest.approx(5.2)


def test_sub_images_without_boxes_are_left_out() -> None:
    measured = attention_in_boxes(KnownAttention(1.0), make_images(3), [[(0, 0, 14, 14)], [], [(42, 14, 56, 28)]])
    assert measured.num_sub_images == 2
    assert measured.share == pytest.approx(0.5)


def test_boxes_are_scaled_to_the_global_view_and_cut_at_slices() -> None:
    plan = SlicePlan(grid=(2, 1), global_size=(56, 28), slice_size=(56, 56), patch_grids=((2, 4), (4, 4), (4, 4)))
    whole, left, right = sub_image_boxes(plan, 224, 112, [(100, 20, 124, 40), (200, 100, 224, 112)])
    assert whole == [(25, 5, 31, 10), (50, 25, 56, 28)]
    assert left == [(50, 10, 56, 20)]
    assert right == [(0, 10, 6, 20), (44, 50, 56, 56)]


def test_an_image_without_slices_has_one_list_of_boxes() -> None:
    plan = SlicePlan(grid=None, global_size=(28, 28), slice_size=None, patch_grids=((2, 2),))
    assert sub_image_boxes(plan, 14, 14, [(1, 2, 3, 4)]) == [[(2, 4, 6, 8)]]
