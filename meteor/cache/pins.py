"""The versions that runs resume on: taking hold, who holds which, and letting go."""

from collections.abc import Mapping
from typing import Any

from meteor import storage
from meteor.cache.folder import PINS
from meteor.cache.manifest import manifest_uri
from meteor.errors import AlreadyExistsError, CacheError

_SUFFIX = ".json"


def pin_version(cache_uri: str, version: int, run_digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a version from `gc`; the first pin of a run stays.

    Returns:
        The pin in force: ``payload`` and ``manifest_version`` as first pinned.

    Raises:
        CacheError: the version was deleted in the meantime.
    """
    uri, pinned = _uri(cache_uri, run_digest), {**payload, "manifest_version": version}
    try:
        storage.create_bytes(uri, storage.json_bytes(pinned))
    except AlreadyExistsError:
        return storage.read_json(uri)
    # `gc` deletes a manifest and then looks for pins; we pin and then look for the manifest: one of the two sees the other.
    if not storage.exists(manifest_uri(cache_uri, version)):
        storage.delete(uri)
        raise CacheError(
            f"{cache_uri}: version {version} was deleted just before it was pinned; open the latest and pin that"
        )
    return pinned


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
    uri = _uri(cache_uri, run_digest)
    if not storage.exists(uri):
        raise CacheError(f"{cache_uri} has no pin of run {run_digest!r}; `meteor cache show` lists the pins")
    storage.delete(uri)


def _uri(cache_uri: str, run_digest: str) -> str:
    return storage.join(cache_uri, PINS, f"{run_digest}{_SUFFIX}")
