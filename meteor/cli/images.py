"""Search of a cache for images that a command line names."""

import logging
from collections.abc import Sequence, Set

from meteor import storage
from meteor.cache import DatasetIndex, FeatureCache
from meteor.errors import CacheError

IMAGE_HELP = "image key, beginning of an image key, or name in the dataset index"
_KEY_DIGITS, _MIN_PREFIX = 64, 6
_LOG = logging.getLogger(__name__)


def find_images(cache: FeatureCache, images: Sequence[str]) -> dict[str, str]:
    """Find images in a cache.

    Args:
        cache: the feature cache.
        images: each an image key, a unique beginning of a key, or a name or URI in the dataset index beside the cache.

    Returns:
        Image key -> name for the image's output files: the name in the samples if the image was found by name or URI, else
        the key. If a quarantined file could not be read, so that it has no key, its name stands for the key. If an image is
        found by several names, the first counts, and a warning is logged.

    Raises:
        CacheError: an entry of ``images`` fits no image, or several images.
    """
    keys = {*cache.keys(), *cache.quarantined()}
    index = DatasetIndex.latest(storage.join(cache.uri.rsplit("/", 2)[0], "index"))
    found: dict[str, str] = {}
    for image in images:
        row = index.lookup(image) if index else None
        key, name = (row.image_key or row.name, row.name) if row else (_complete(image, keys, cache.uri),) * 2
        if found.setdefault(key, name) != name:
            _LOG.warning("%s is the same image as %s: there is one file for both", image, found[key])
    return found


def _complete(image: str, keys: Set[str], cache_uri: str) -> str:
    """Return the only key that begins with ``image``."""
    if image in keys:
        return image
    matches = {key for key in keys if key.startswith(image)} if len(image) >= _MIN_PREFIX else set()
    if len(matches) != 1:
        problem = f"fits {len(matches)} image keys" if matches else "is no image key and no name in the dataset index"
        raise CacheError(
            f"{image!r} {problem} of {cache_uri}; give all {_KEY_DIGITS} digits, or the image's name in the samples"
        )
    return matches.pop()
