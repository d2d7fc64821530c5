"""Calibration of a cache whose codec needs it, before any features are written; one encoder does it.

It uses the images with the lowest keys, so that every start chooses the same images.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import ray

from meteor.assembly import pixel_settings
from meteor.cache import CALIBRATION_IMAGES, IndexRow, calibrate, needs_calibration
from meteor.config import RunSettings
from meteor.errors import BadImageError
from meteor.features import ImageFeatures
from meteor.image.pixels import PixelSettings, SlicedImage, slice_bytes
from pipelines.ray_parts.encoder import DeviceEncoder
from pipelines.ray_parts.runtime import worker_environment
from pipelines.ray_parts.slicing import read_unchanged

_LOG = logging.getLogger(__name__)
_NUM_THREADS = 4
_BATCH_SIZE = 16


def calibrate_cache(settings: RunSettings, cache_uri: str, wanted: Mapping[str, IndexRow]) -> None:
    """Calibrate a cache, unless its codec needs no calibration or another job has calibrated it.

    Args:
        settings: settings of the run.
        cache_uri: URI of a cache that exists.
        wanted: image key -> row in the index, for all images of the run.
    """
    if not wanted or not needs_calibration(cache_uri):
        return
    places = [(key, wanted[key].uri) for key in sorted(wanted)[:CALIBRATION_IMAGES]]
    _LOG.info("calibrating %s on %d images", settings.cache.codec, len(places))
    runtime = settings.runtime
    # The features stay in the worker, as those of 256 images have more than a gigabyte.
    task = ray.remote(_calibrate).options(
        num_cpus=runtime.cpus_per_encoder,
        num_gpus=runtime.gpus_per_encoder or None,
        runtime_env={"env_vars": worker_environment(runtime.gpus_per_encoder)},
    )
    ray.get(task.remote(settings, cache_uri, places))


def _calibrate(settings: RunSettings, cache_uri: str, places: list[tuple[str, str]]) -> None:
    calibrate(cache_uri, encode_places(DeviceEncoder(settings), places, pixel_settings(settings)))


def encode_places(
    device: DeviceEncoder, places: list[tuple[str, str]], pixels: PixelSettings
) -> Iterator[ImageFeatures]:
    """Yield the features of images, given as (image key, URI), without images that cannot be encoded."""

    def load(place: tuple[str, str]) -> SlicedImage | None:
        image_key, uri = place
        try:
            return slice_bytes(read_unchanged(uri, image_key), image_key, pixels)
        except BadImageError:
            return None  # the encoding pass reports the image

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for first in range(0, len(places), _BATCH_SIZE):
            images = [image for image in pool.map(load, places[first : first + _BATCH_SIZE]) if image]
            encoded, _ = device.encode(images)
            yield from (image for image in encoded if not isinstance(image, BadImageError))
