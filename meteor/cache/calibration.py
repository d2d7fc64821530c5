"""The calibration of an int8 cache: computed once from a sample of images, published once, and valid for all files.

Letters: P patches of a sub-image, C vision width.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from meteor import storage
from meteor.cache.codec import INT8_CODEC, INT8_LIMIT, Codec, Int8Codec, get_codec
from meteor.cache.folder import CALIBRATION, CacheInfo, read_cache_info
from meteor.cache.table import check_schema_version
from meteor.errors import AlreadyExistsError, CacheError, NotFoundError
from meteor.features import ImageFeatures

# Number of images in a calibration's sample. Those with the lowest keys are a random sample, because keys are sha256.
CALIBRATION_IMAGES = 256
# Share of a channel's range that is added at each end, for images outside the sample.
MARGIN = 0.05
_SCHEMA_VERSION = 1
_DIGEST_DIGITS = 16
_LARGEST = torch.finfo(torch.float16).max


def needs_calibration(cache_uri: str) -> bool:
    """Return whether `calibrate` must be called before the first row is written."""
    return read_cache_info(cache_uri).codec == INT8_CODEC and not storage.exists(_calibration_uri(cache_uri))


def open_codec(cache_uri: str) -> Codec:
    """Return the codec of the cache with its published calibration.

    Raises:
        CacheError: the cache does not exist, it is not calibrated, or its calibration is damaged.
    """
    return codec_of(cache_uri, read_cache_info(cache_uri))


def codec_of(cache_uri: str, info: CacheInfo) -> Codec:
    """Return the codec of a cache like `open_codec`, for callers that have read ``identity.json`` already."""
    return _read_calibration(cache_uri) if info.codec == INT8_CODEC else get_codec(info.codec)


def calibrate(cache_uri: str, images: Iterable[ImageFeatures]) -> Codec:
    """Compute and publish the calibration unless the cache has one; among several writers the first calibration stays.

    Args:
        cache_uri: URI from `create_cache`.
        images: the images with the `CALIBRATION_IMAGES` lowest keys among all images to be cached, in any order. Images
            with values outside float16's range are left out. If the cache is calibrated already, no image is read.

    Returns:
        The codec with the published calibration, whichever writer published it.

    Raises:
        CacheError: no image can be used, or the images differ in width.
    """
    if needs_calibration(cache_uri):
        content = calibration_bytes(images)
        with suppress(AlreadyExistsError):
            storage.create_bytes(_calibration_uri(cache_uri), content)
    # Read back, because another writer may have been first.
    return open_codec(cache_uri)


def calibration_bytes(images: Iterable[ImageFeatures]) -> bytes:
    """Compute a calibration as JSON; the bytes do not depend on the order of the images. Raises CacheError."""
    ranges = _Ranges()
    for image in images:
        ranges.add(image)
    if not ranges.num_sub_images:
        raise CacheError(
            f"{INT8_CODEC} needs images to calibrate on, but none of {ranges.num_refused} had features within float16's "
            "range: check the encoder, or choose the codec bfloat16"
        )
    low_C, high_C = ranges.low.double().cpu(), ranges.high.double().cpu()
    # Each channel has a centre, because CLIP's outlier channels lie far from zero with a small spread. This was measured on
    # random features (1 % of the channels at 40 +- 2, the others at 0 +- 1) of images outside the sample. With centres the
    # relative error is 0.24 %, without them 0.36 %. Relative to the spread of an outlier channel it is 1.1 % and 5.5 %.
    margin_C = MARGIN * (high_C - low_C)
    low_C, high_C = (low_C - margin_C).clamp_min(-_LARGEST), (high_C + margin_C).clamp_max(_LARGEST)
    scale_C = ((high_C - low_C) / (2 * INT8_LIMIT)).float()
    # The channel counts as constant if its scale is too small to divide by.
    scale_C[scale_C < torch.finfo(torch.float32).tiny] = 0
    return storage.json_bytes(
        {
            "schema_version": _SCHEMA_VERSION,
            "codec": INT8_CODEC,
            "num_images": len(ranges.image_keys),
            "num_sub_images": ranges.num_sub_images,
            "images_digest": hashlib.sha256("\n".join(sorted(ranges.image_keys)).encode()).hexdigest(),
            "margin": MARGIN,
            "vision_width": len(scale_C),
            "scales": scale_C.tolist(),
            "centres": ((low_C + high_C) / 2).float().tolist(),
        }
    )


@dataclass
class _Ranges:
    """The lowest and the highest value of each channel over the images so far, both (C), empty before the first image."""

    low: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    high: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    num_sub_images: int = 0
    num_refused: int = 0
    image_keys: set[str] = field(default_factory=set)

    def add(self, image: ImageFeatures) -> None:
        if image.image_key in self.image_keys:
            return
        features = [feature_PC.detach().float() for feature_PC in image.features]
        low_C = torch.stack([feature_PC.amin(dim=0) for feature_PC in features]).amin(dim=0)
        high_C = torch.stack([feature_PC.amax(dim=0) for feature_PC in features]).amax(dim=0)
        # Comparisons with NaN are false, so this refuses NaN too.
        if not ((low_C >= -_LARGEST) & (high_C <= _LARGEST)).all():
            self.num_refused += 1
            return
        if self.num_sub_images and low_C.shape != self.low.shape:
            raise CacheError(
                f"image {image.image_key} has {len(low_C)} channels, the images before it {len(self.low)}: calibrate "
                "on features of one encoder"
            )
        self.low = torch.minimum(self.low, low_C) if self.num_sub_images else low_C
        self.high = torch.maximum(self.high, high_C) if self.num_sub_images else high_C
        self.num_sub_images += image.num_sub_images
        self.image_keys.add(image.image_key)


def _calibration_uri(cache_uri: str) -> str:
    return storage.join(cache_uri, CALIBRATION)


def _read_calibration(cache_uri: str) -> Int8Codec:
    uri = _calibration_uri(cache_uri)
    try:
        data = storage.read_bytes(uri)
    except NotFoundError as error:
        raise CacheError(f"{cache_uri} is not calibrated yet ({uri} is missing); run cache_features") from error
    try:
        content = json.loads(data)
        check_schema_version(uri, content["schema_version"], _SCHEMA_VERSION)
        return Int8Codec(_channels(content, "scales"), _channels(content, "centres"), _digest(data))
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{uri} is damaged ({error!r}); restore it, because the features of this cache cannot be read without it"
        ) from error


def _channels(content: dict[str, Any], name: str) -> torch.Tensor:
    value_C = torch.tensor(content[name], dtype=torch.float32)
    if value_C.shape != (content["vision_width"],) or not value_C.isfinite().all():
        raise ValueError(f"{name} are not {content['vision_width']} finite numbers")
    return value_C


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]
