"""Features are a source: from the cache, or made on the spot by the same code that fills the cache."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from meteor import storage
from meteor.cache.row import ImageFeatures
from meteor.errors import BadImageError, DataError, NotFoundError
from meteor.image.decode import decode_image
from meteor.image.slicing import SlicePlan, check_aspect_ratio, plan_slices
from meteor.image.transform import normalise, slice_image
from meteor.vision.encoder import FrozenClip


class FeatureSource(Protocol):
    """Where training and evaluation get features from: a `FeatureCache` or `LiveFeatures`."""

    def get(self, image_key: str) -> ImageFeatures: ...


@dataclass(frozen=True)
class PixelSettings:
    """What decides which pixels the encoder gets, and which pictures it refuses."""

    max_slices: int = 6
    resolution: int = 336
    patch_size: int = 14
    max_aspect_ratio: float = 24.0
    max_pixels: int = 178_956_970

    def plan(self, width: int, height: int) -> SlicePlan:
        """The slices of a picture of this size; `BadImageError` where its aspect ratio is refused."""
        check_aspect_ratio(width, height, self.max_aspect_ratio)
        return plan_slices(
            width, height, max_slices=self.max_slices, resolution=self.resolution, patch_size=self.patch_size
        )


@dataclass(frozen=True)
class SlicedImage:
    """A decoded picture, ready for the encoder: sub-images as uint8 (h, w, 3), the global view first."""

    image_key: str
    width: int
    height: int
    plan: SlicePlan
    sub_images: tuple[np.ndarray, ...]


def slice_bytes(data: bytes, image_key: str, settings: PixelSettings) -> SlicedImage:
    """From a file's bytes to sub-images (spec: slicing rule, steps 1 to 7).

    Raises:
        BadImageError: not a picture, truncated, too large, or too long.
    """
    image = decode_image(data, max_pixels=settings.max_pixels)
    plan = settings.plan(image.width, image.height)
    return SlicedImage(image_key, image.width, image.height, plan, tuple(slice_image(image, plan)))


def encode_sliced(images: Sequence[SlicedImage], encoder: FrozenClip) -> list[ImageFeatures]:
    """Encode several pictures together; their sub-images of equal size share a batch.

    Raises:
        BadImageError: the encoder's output is not finite for one of them; encode them one by one to find which.
    """
    pixels = [normalise(sub, encoder.mean, encoder.std) for image in images for sub in image.sub_images]
    encoded = iter(encoder.encode(pixels))
    results = []
    for image in images:
        parts = [next(encoded) for _ in image.sub_images]
        results.append(
            ImageFeatures(
                image_key=image.image_key,
                width=image.width,
                height=image.height,
                grid=image.plan.grid,
                patch_grids=image.plan.patch_grids,
                attention_layers=encoder.attention_layers,
                features=[part.features.cpu() for part in parts],
                cls_attention=[part.cls_attention.float().cpu() for part in parts],
                cls=torch.stack([part.cls for part in parts]).float().cpu(),
            )
        )
    return results


class LiveFeatures:
    """Encodes a picture whenever it is asked for: the control in benchmarks, and the way without space for a cache.

    Args:
        encoder: the frozen tower.
        uris: image key -> where the picture's file is.
        settings: slicing and limits.
    """

    def __init__(self, encoder: FrozenClip, uris: Mapping[str, str], settings: PixelSettings) -> None:
        self.encoder, self.uris, self.settings = encoder, uris, settings

    def get(self, image_key: str) -> ImageFeatures:
        """Read, slice, encode.

        Raises:
            DataError: the picture is gone or has changed since it was indexed.
        """
        uri = self.uris[image_key]
        try:
            data = storage.read_bytes(uri)
            if hashlib.sha256(data).hexdigest() != image_key:
                raise DataError(f"{uri} has changed since it was indexed as {image_key}: run cache_features again")
            return encode_sliced([slice_bytes(data, image_key, self.settings)], self.encoder)[0]
        except (BadImageError, NotFoundError) as error:
            raise DataError(f"{uri} was readable when it was indexed and is not now ({error})") from error
