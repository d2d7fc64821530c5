"""Measure of whether a vision tower attends to objects: class-token attention inside their boxes, against chance.

Letters: P patches of a sub-image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from meteor.image.slicing import SlicePlan, plan_slices
from meteor.image.transform import normalise, slice_image
from meteor.synthetic.drawing import draw
from meteor.synthetic.layout import Box
from meteor.synthetic.scenes import Scene
from meteor.vision.encoder import FrozenEncoder


@dataclass(frozen=True)
class BoxAttention:
    """Attention inside boxes, as means over sub-images.

    Attributes:
        share: share of the class token's attention to patches that falls inside boxes, 0 to 1.
        chance: share of the area inside boxes, 0 to 1; uniform attention would have this share.
        num_sub_images: number of measured sub-images.
    """

    share: float
    chance: float
    num_sub_images: int

    @property
    def ratio(self) -> float:
        """Attention inside boxes relative to chance; 1 if the tower ignores the boxes."""
        return self.share / self.chance


def attention_in_scenes(encoder: FrozenEncoder, scenes: Sequence[Scene], *, resolution: int) -> BoxAttention:
    """Draw, slice and encode scenes as cache_features does, and measure the attention inside the objects' boxes."""
    images: list[npt.NDArray[np.uint8]] = []
    boxes: list[list[Box]] = []
    for scene in scenes:
        plan = plan_slices(scene.width, scene.height, resolution=resolution, patch_size=encoder.patch_size)
        images += slice_image(draw(scene), plan)
        boxes += sub_image_boxes(plan, scene.width, scene.height, [thing.box for thing in scene.objects])
    return attention_in_boxes(encoder, images, boxes)


def attention_in_boxes(
    encoder: FrozenEncoder, sub_images: Sequence[npt.NDArray[np.uint8]], boxes: Sequence[Sequence[Box]]
) -> BoxAttention:
    """Measure the attention inside boxes, for the encoder's first attention layer.

    Args:
        encoder: frozen tower; its class-token attention is renormalised over the patches here.
        sub_images: pixels of each sub-image, (h, w, 3), with sides that are multiples of the patch size.
        boxes: boxes (x0, y0, x1, y1) of each sub-image in its pixels; a patch counts by its covered share. Sub-images
            without boxes are left out.
    """
    chosen = [index for index, its_boxes in enumerate(boxes) if its_boxes]
    encoded = encoder.encode([normalise(sub_images[index], encoder.mean, encoder.std) for index in chosen])
    shares, chances = [], []
    for index, seen in zip(chosen, encoded, strict=True):
        height, width, _ = sub_images[index].shape
        covered_P = torch.from_numpy(patch_coverage(width, height, boxes[index], encoder.patch_size))
        attention_P = seen.cls_attention[0].cpu()
        shares.append(float(attention_P @ covered_P / attention_P.sum()))
        chances.append(float(covered_P.mean()))
    return BoxAttention(float(np.mean(shares)), float(np.mean(chances)), len(chosen))


def sub_image_boxes(plan: SlicePlan, width: int, height: int, boxes: Sequence[Box]) -> list[list[Box]]:
    """Map an image's boxes to its sub-images: scaled, clipped at the edges, and dropped if nothing remains.

    Args:
        plan: slicing plan of an image of ``width`` x ``height`` pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.
        boxes: boxes in the image's pixels.

    Returns:
        Boxes of each sub-image in its own pixels, rounded outwards, the global view first.
    """
    whole = _cut(boxes, plan.global_size[0] / width, plan.global_size[1] / height, (0, 0), plan.global_size)
    if plan.grid is None or plan.slice_size is None:
        return [whole]
    (columns, rows), (slice_width, slice_height) = plan.grid, plan.slice_size
    scale_x, scale_y = slice_width * columns / width, slice_height * rows / height
    origins = [(column * slice_width, row * slice_height) for row in range(rows) for column in range(columns)]
    return [whole, *(_cut(boxes, scale_x, scale_y, origin, plan.slice_size) for origin in origins)]


def _cut(
    boxes: Sequence[Box], scale_x: float, scale_y: float, origin: tuple[int, int], size: tuple[int, int]
) -> list[Box]:
    cut = []
    for box in boxes:
        x0 = max(math.floor(box[0] * scale_x) - origin[0], 0)
        y0 = max(math.floor(box[1] * scale_y) - origin[1], 0)
        x1 = min(math.ceil(box[2] * scale_x) - origin[0], size[0])
        y1 = min(math.ceil(box[3] * scale_y) - origin[1], size[1])
        if x0 < x1 and y0 < y1:
            cut.append((x0, y0, x1, y1))
    return cut


def patch_coverage(width: int, height: int, boxes: Sequence[Box], patch_size: int) -> npt.NDArray[np.float32]:
    """Return the share of each patch, row by row, that lies in any box, (P,); all lengths are in pixels."""
    inside = np.zeros((height, width), dtype=np.float32)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = 1
    patches = inside.reshape(height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.mean(axis=(1, 3)).reshape(-1)
