"""The versions that runs resume on: who holds which, and letting go."""

from typing import Any

from meteor import storage
from meteor.cache.folder import PINS
from meteor.errors import CacheError

_SUFFIX = ".json"


def pins(cache_uri: str) -> list[dict[str, Any]]:
    """All pins: ``run_digest``, ``manifest_version``, ``pinned_s`` (epoch seconds) and what the run noted besides.

    Raises:
        StorageError: a pin is damaged, so nobody can tell which version it holds.
    """
    found = []
    for info in storage.list_objects(storage.join(cache_uri, PINS)):
        run_digest = info.uri.rpartition("/")[2].removesuffix(_SUFFIX)
        found.append({**storage.read_json(info.uri), "run_digest": run_digest, "pinned_s": info.modified_s})
    return found


def unpin(cache_uri: str, run_digest: str) -> None:
    """Let `gc` have the version that only this run held; a run that is started again pins the latest version then.

    Raises:
        CacheError: the run has no pin.
    """
    uri = storage.join(cache_uri, PINS, f"{run_digest}{_SUFFIX}")
    if not storage.exists(uri):
        raise CacheError(f"{cache_uri} has no pin of run {run_digest!r}; `meteor cache show` lists the pins")
    storage.delete(uri)
