"""Audit of a run's cache: images are encoded again and compared."""

from collections.abc import Callable

from meteor.assembly.encoders import cache_identity, load_encoder
from meteor.assembly.places import cache_uri, index_uri, pixel_settings
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings
from meteor.data.audit import CacheAudit, audit_cache
from meteor.vision.live import LiveFeatures


def audit_run(
    settings: RunSettings,
    *,
    num_images: int,
    tolerance: float,
    seed: int,
    device: str | None,
    on_progress: Callable[[int, int], None] | None,
) -> CacheAudit:
    """Audit the latest version of the run's cache with the run's encoder.

    Raises:
        CacheError: there is no cache for these settings, or no index of the images.
    """
    encoder = load_encoder(settings, device=device)
    cache = FeatureCache.open(cache_uri(settings, cache_identity(settings, encoder)))
    index = DatasetIndex.latest(index_uri(settings))
    uris = {row.image_key: row.uri for row in index.rows() if row.status == "ok"} if index else {}
    live = LiveFeatures(encoder, uris, pixel_settings(settings))
    return audit_cache(
        cache, live, uris, num_images=num_images, tolerance=tolerance, seed=seed, on_progress=on_progress
    )
