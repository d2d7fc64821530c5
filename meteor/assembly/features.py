"""Feature source of a worker, and the images of a stage as the dataset index knows them."""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from meteor.assembly.encoders import load_encoder
from meteor.assembly.places import pixel_settings
from meteor.cache import DatasetIndex, FeatureCache, IndexRow
from meteor.cache.disk_tier import DiskTier
from meteor.config import RunSettings
from meteor.data.indexed_images import IndexedImage
from meteor.vision.live import LiveFeatures


def open_features(
    settings: RunSettings, source: str, *, cache: str, version: int, uris: Mapping[str, str], device: str
) -> FeatureCache | LiveFeatures:
    """Open the feature source of a worker: a version of the cache, or the live encoder."""
    if source == "cache":
        options = settings.cache
        # A disk tier in front of a local cache would keep the same bytes twice.
        tier = (
            DiskTier(options.disk_tier, int(options.disk_tier_gb * 10**9))
            if options.disk_tier and cache.startswith("s3://")
            else None
        )
        return FeatureCache.open(cache, version=version, disk_tier=tier)
    return LiveFeatures(load_encoder(settings, device=device), uris, pixel_settings(settings))


def uris_by_key(rows: Iterable[IndexRow]) -> dict[str, str]:
    """Return image key -> URI of a file with that content, for images that can be used."""
    return {row.image_key: row.uri for row in rows if row.status == "ok"}


def indexed_images(
    index: DatasetIndex, names: pa.StringArray, quarantined: Mapping[str, str]
) -> dict[str, IndexedImage]:
    """Look up images in the index by name; the result omits names that the index lacks.

    Args:
        index: the dataset index.
        names: names of the images.
        quarantined: image key -> reason for which the encoder refused the image.
    """
    rows = index.rows_named(names)
    columns = [rows[name].to_pylist() for name in ("name", "image_key", "width", "height", "reason")]
    return {
        name: IndexedImage(key, width, height, reason or quarantined.get(key, ""))
        for name, key, width, height, reason in zip(*columns, strict=True)
    }
