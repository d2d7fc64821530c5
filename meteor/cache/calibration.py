"""The calibration of a cache whose codec needs one: made once from a sample, published once, the same for all files.

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

# How many images a calibration looks at: those with the lowest image keys, which by sha256 is a random sample.
CALIBRATION_IMAGES = 256
# Added to each end of a channel's range, as a share of the range, for the images that are not in the sample.
MARGIN = 0.05
_SCHEMA_VERSION = 1
_DIGEST_DIGITS = 16
_LARGEST = torch.finfo(torch.float16).max


def needs_calibration(cache_uri: str) -> bool:
    """Whether `calibrate` must come before the first row."""
    return read_cache_info(cache_uri).codec == INT8_CODEC and not storage.exists(_calibration_uri(cache_uri))


def open_codec(cache_uri: str) -> Codec:
    """The codec of the cache, with the calibration in force.

    Raises:
        CacheError: there is no cache, it is not calibrated, or its calibration is damaged.
    """
    return codec_of(cache_uri, read_cache_info(cache_uri))


def codec_of(cache_uri: str, info: CacheInfo) -> Codec:
    """`open_codec` for who has read ``identity.json`` already."""
    return _read_calibration(cache_uri) if info.codec == INT8_CODEC else get_codec(info.codec)


def calibrate(cache_uri: str, images: Iterable[ImageFeatures]) -> Codec:
    """Make and publish the calibration unless the cache has one; of several writers the first one's stays.

    Args:
        cache_uri: a cache that `create_cache` made.
        images: those of the `CALIBRATION_IMAGES` lowest image keys of what will be cached, in any order. Images with
            values that float16 does not hold are left out. Nothing is read of them when there is nothing to do.

    Returns:
        The codec in force, whoever calibrated it.

    Raises:
        CacheError: no image can be used, or they differ in width.
    """
    if needs_calibration(cache_uri):
        content = calibration_bytes(images)
        with suppress(AlreadyExistsError):
            storage.create_bytes(_calibration_uri(cache_uri), content)
    # Read back: another writer may have been first.
    return open_codec(cache_uri)


def calibration_bytes(images: Iterable[ImageFeatures]) -> bytes:
    """What `calibrate` publishes: JSON, the same bytes for the same images in any order. Raises CacheError."""
    ranges = _Ranges()
    for image in images:
        ranges.add(image)
    if not ranges.num_sub_images:
        raise CacheError(
            f"{INT8_CODEC} needs images to calibrate on, and none of {ranges.num_refused} had features that float16 "
            "holds: check the encoder, or choose the codec bfloat16"
        )
    low_C, high_C = ranges.low.double().cpu(), ranges.high.double().cpu()
    # The range has a centre: CLIP's outlier channels lie far from zero with a small spread. With random features (1 % of
    # the channels at 40 +- 2, the others at 0 +- 1, other images than calibrated on) the relative error is 0.24 %, with
    # scales about zero 0.36 %; in units of an outlier channel's spread 1.1 % against 5.5 %.
    margin_C = MARGIN * (high_C - low_C)
    low_C, high_C = (low_C - margin_C).clamp_min(-_LARGEST), (high_C + margin_C).clamp_max(_LARGEST)
    scale_C = ((high_C - low_C) / (2 * INT8_LIMIT)).float()
    # So small that it cannot be divided by: constant.
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
    """The lowest and highest value of each channel over the images so far; both are (C), empty before the first."""

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
        # False for NaN, too.
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
            f"{uri} is damaged ({error!r}); restore it: without it the features of this cache cannot be read"
        ) from error


def _channels(content: dict[str, Any], name: str) -> torch.Tensor:
    value_C = torch.tensor(content[name], dtype=torch.float32)
    if value_C.shape != (content["vision_width"],) or not value_C.isfinite().all():
        raise ValueError(f"{name} are not {content['vision_width']} finite numbers")
    return value_C


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]
