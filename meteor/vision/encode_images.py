"""Encoding of sliced images: all sub-images of several images in one pass, then one `ImageFeatures` per image."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from meteor.errors import BadImageError
from meteor.features import ImageFeatures
from meteor.image.pixels import SlicedImage
from meteor.image.transform import normalise_batch
from meteor.vision.encoder import FrozenEncoder, SubImageFeatures


def encode_sliced(images: Sequence[SlicedImage], encoder: FrozenEncoder) -> list[ImageFeatures]:
    """Encode several images of any patch grids together; the result is on the CPU.

    Raises:
        BadImageError: the encoder's output is not finite for an image. `encode_each` returns the error instead.
    """
    results = []
    for image in encode_each(images, encoder):
        if isinstance(image, BadImageError):
            raise image
        features, attention = ([part.cpu() for part in parts] for parts in (image.features, image.cls_attention))
        results.append(replace(image, features=features, cls_attention=attention, cls=image.cls.cpu()))
    return results


def load_pixels(images: Sequence[SlicedImage], encoder: FrozenEncoder) -> list[torch.Tensor]:
    """Normalise all sub-images of the images, in order, on the encoder's device (`normalise_batch`)."""
    sub_images = [sub_image for image in images for sub_image in image.sub_images]
    return normalise_batch(sub_images, encoder.mean, encoder.std, device=encoder.device, dtype=encoder.dtype)


def encode_each(
    images: Sequence[SlicedImage], encoder: FrozenEncoder, pixels: Sequence[torch.Tensor] | None = None
) -> list[ImageFeatures | BadImageError]:
    """Encode several images together; an image with non-finite features gives an error instead of failing the batch.

    Args:
        images: sliced images.
        encoder: the frozen tower.
        pixels: result of `load_pixels`, if it was called earlier to overlap copying with encoding; computed if None.

    Returns:
        Features on the encoder's device, or an error, for each image in order.
    """
    encoded = iter(encoder.encode(load_pixels(images, encoder) if pixels is None else pixels, raise_bad=False))
    return [_join(image, [next(encoded) for _ in image.sub_images], encoder.attention_layers) for image in images]


def _join(
    image: SlicedImage, parts: Sequence[SubImageFeatures], attention_layers: tuple[int, ...]
) -> ImageFeatures | BadImageError:
    if num_bad := sum(not part.finite for part in parts):
        return BadImageError(
            "non_finite_features",
            f"the encoder produced values that are not finite in {num_bad} of {len(parts)} sub-images of {image.image_key}",
        )
    return ImageFeatures(
        image_key=image.image_key,
        width=image.width,
        height=image.height,
        grid=image.plan.grid,
        patch_grids=image.plan.patch_grids,
        attention_layers=attention_layers,
        features=[part.features for part in parts],
        cls_attention=[part.cls_attention for part in parts],
        cls=torch.stack([part.cls for part in parts]).float(),
    )
