"""Images as people name them on a command line, found in a cache."""

import logging
from collections.abc import Sequence, Set

from meteor import storage
from meteor.cache import DatasetIndex, FeatureCache
from meteor.errors import CacheError

IMAGE_HELP = "image key, the start of one, or a name in the dataset index"
_KEY_DIGITS, _MIN_PREFIX = 64, 6
_LOG = logging.getLogger(__name__)


def find_images(cache: FeatureCache, asked: Sequence[str]) -> dict[str, str]:
    """Find images by image key, unique beginning of a key, or name or URI in the dataset index beside the cache.

    Returns:
        Image key -> the name that the image's files get: as samples have it where it was asked by name or URI, else the
        key. Of a quarantined image whose file could not be read, its name stands for the key. Of several names of one
        image the first counts, with a warning.

    Raises:
        CacheError: something is neither, or fits several images.
    """
    keys = {*cache.keys(), *cache.quarantined()}
    index = DatasetIndex.latest(storage.join(cache.uri.rsplit("/", 2)[0], "index"))
    found: dict[str, str] = {}
    for image in asked:
        row = index.lookup(image) if index else None
        key, name = (row.image_key or row.name, row.name) if row else (_complete(image, keys, cache.uri),) * 2
        if found.setdefault(key, name) != name:
            _LOG.warning("%s is the same image as %s: there is one file for both", image, found[key])
    return found


def _complete(image: str, keys: Set[str], cache_uri: str) -> str:
    """The one key that begins so."""
    if image in keys:
        return image
    matches = {key for key in keys if key.startswith(image)} if len(image) >= _MIN_PREFIX else set()
    if len(matches) != 1:
        what = f"fits {len(matches)} image keys" if matches else "is no image key and no name in the dataset index"
        raise CacheError(
            f"{image!r} {what} of {cache_uri}; give all {_KEY_DIGITS} digits, or a name as samples have it"
        )
    return matches.pop()
