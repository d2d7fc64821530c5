"""Pictures as people name them on a command line, found in a cache."""

import logging
from collections.abc import Sequence, Set

from meteor import storage
from meteor.cache import DatasetIndex, FeatureCache
from meteor.errors import CacheError

PICTURE_HELP = "image key, the start of one, or a name in the dataset index"
_KEY_DIGITS, _MIN_PREFIX = 64, 6
_LOG = logging.getLogger(__name__)


def find_pictures(cache: FeatureCache, asked: Sequence[str]) -> dict[str, str]:
    """Find pictures by image key, unique beginning of a key, or name or URI in the dataset index beside the cache.

    Returns:
        Image key -> the name that the picture's files get: as samples have it where it was asked by name or URI, else the
        key. Of a quarantined picture whose file could not be read, its name stands for the key. Of several names of one
        picture the first counts, with a warning.

    Raises:
        CacheError: something is neither, or fits several pictures.
    """
    keys = {*cache.keys(), *cache.quarantined()}
    index = DatasetIndex.latest(storage.join(cache.uri.rsplit("/", 2)[0], "index"))
    found: dict[str, str] = {}
    for picture in asked:
        row = index.lookup(picture) if index else None
        key, name = (row.image_key or row.name, row.name) if row else (_complete(picture, keys, cache.uri),) * 2
        if found.setdefault(key, name) != name:
            _LOG.warning("%s is the same picture as %s: there is one file for both", picture, found[key])
    return found


def _complete(picture: str, keys: Set[str], cache_uri: str) -> str:
    """The one key that begins so."""
    if picture in keys:
        return picture
    matches = {key for key in keys if key.startswith(picture)} if len(picture) >= _MIN_PREFIX else set()
    if len(matches) != 1:
        what = f"fits {len(matches)} image keys" if matches else "is no image key and no name in the dataset index"
        raise CacheError(
            f"{picture!r} {what} of {cache_uri}; give all {_KEY_DIGITS} digits, or a name as samples have it"
        )
    return matches.pop()
