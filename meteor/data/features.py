"""Features are a source: from the cache, or made on the spot by the same code that fills the cache."""

import hashlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from meteor import storage
from meteor.cache.row import ImageFeatures
from meteor.errors import BadImageError, DataError, NotFoundError
from meteor.image.decode import decode_image
from meteor.image.slicing import SlicePlan, check_aspect_ratio, plan_slices
from meteor.image.transform import normalise_batch, slice_image
from meteor.vision.encoder import FrozenClip, SubImageFeatures


class FeatureSource(Protocol):
    """Where training and evaluation get features from: a `FeatureCache` or `LiveFeatures`."""

    def get(self, image_key: str) -> ImageFeatures: ...

    def prefetch(
        self, keys: Iterable[str], *, num_threads: int = ..., max_bytes: int = ...
    ) -> Generator[ImageFeatures, None, None]: ...


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

    def to_bytes(self) -> bytes:
        """The pixels of all sub-images, one after the other; `from_bytes` reads them."""
        return np.concatenate([sub_image.reshape(-1) for sub_image in self.sub_images]).tobytes()

    @classmethod
    def from_bytes(
        cls, image_key: str, width: int, height: int, pixels: bytes | memoryview, settings: "PixelSettings"
    ) -> "SlicedImage":
        """The inverse: the plan follows from the picture's size, and the sub-images share the memory of ``pixels``."""
        plan, side = settings.plan(width, height), settings.patch_size
        shapes = [(rows * side, columns * side, 3) for rows, columns in plan.patch_grids]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = np.split(np.frombuffer(pixels, dtype=np.uint8), ends[:-1])
        sub_images = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(image_key, width, height, plan, sub_images)


def slice_bytes(data: bytes, image_key: str, settings: PixelSettings) -> SlicedImage:
    """From a file's bytes to sub-images (spec: slicing rule, steps 1 to 7).

    Raises:
        BadImageError: not a picture, truncated, too large, or too long.
    """
    image = decode_image(data, max_pixels=settings.max_pixels)
    plan = settings.plan(image.width, image.height)
    return SlicedImage(image_key, image.width, image.height, plan, tuple(slice_image(image, plan)))


def encode_sliced(images: Sequence[SlicedImage], encoder: FrozenClip) -> list[ImageFeatures]:
    """Encode several pictures together, whatever their patch grids; the result is on the CPU.

    Raises:
        BadImageError: the encoder's output is not finite for one of them; see `encode_each`.
    """
    results = []
    for image in encode_each(images, encoder):
        if isinstance(image, BadImageError):
            raise image
        features, attention = ([one.cpu() for one in parts] for parts in (image.features, image.cls_attention))
        results.append(replace(image, features=features, cls_attention=attention, cls=image.cls.cpu()))
    return results


def load_pixels(images: Sequence[SlicedImage], encoder: FrozenClip) -> list[torch.Tensor]:
    """All sub-images of the pictures in order, normalised on the encoder's device; see `normalise_batch`."""
    sub_images = [sub_image for image in images for sub_image in image.sub_images]
    return normalise_batch(sub_images, encoder.mean, encoder.std, device=encoder.device, dtype=encoder.dtype)


def encode_each(
    images: Sequence[SlicedImage], encoder: FrozenClip, pixels: Sequence[torch.Tensor] | None = None
) -> list[ImageFeatures | BadImageError]:
    """Encode several pictures together; a picture whose features are not finite becomes its error, among good neighbours.

    The features stay on the encoder's device. ``pixels`` is what `load_pixels` gives, for who wants to call it earlier.
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

    def prefetch(
        self, keys: Iterable[str], *, num_threads: int = 1, max_bytes: int = 0
    ) -> Generator[ImageFeatures, None, None]:
        """One after the other, whatever the limits of reading ahead: there is one encoder."""
        yield from map(self.get, keys)
