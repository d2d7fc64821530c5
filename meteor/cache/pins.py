"""Pins, which keep the versions on which runs resume: creation, listing and removal."""

from collections.abc import Mapping
from typing import Any

from meteor import storage
from meteor.cache.folder import PINS
from meteor.cache.manifest import manifest_uri
from meteor.checksums import checked_json_bytes, read_checked_json
from meteor.errors import AlreadyExistsError, CacheError

_SUFFIX = ".json"


def pin_version(cache_uri: str, version: int, run_digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Pin a version for a run, so that `gc` keeps it; a run's first pin stays.

    Returns:
        The run's first pin, with ``payload`` and ``manifest_version``.

    Raises:
        CacheError: the version was deleted in the meantime.
    """
    uri, pinned = _uri(cache_uri, run_digest), {**payload, "manifest_version": version}
    try:
        storage.create_bytes(uri, checked_json_bytes(pinned))
    except AlreadyExistsError:
        return read_checked_json(uri)
    # `gc` deletes a manifest and then looks for pins. Here the pin comes first and then the look for the manifest, so in a
    # race at least one of the two notices the other.
    if not storage.exists(manifest_uri(cache_uri, version)):
        storage.delete(uri)
        raise CacheError(
            f"{cache_uri}: version {version} was deleted just before it was pinned; open and pin the latest version"
        )
    return pinned


def pins(cache_uri: str) -> list[dict[str, Any]]:
    """List all pins with ``run_digest``, ``manifest_version``, ``pinned_s`` (epoch seconds) and the run's payload.

    Raises:
        DamagedError: a pin is damaged, so the version that it keeps is unknown.
    """
    found = []
    for info in storage.list_objects(storage.join(cache_uri, PINS)):
        run_digest = info.uri.rpartition("/")[2].removesuffix(_SUFFIX)
        found.append({**read_checked_json(info.uri), "run_digest": run_digest, "pinned_s": info.modified_s})
    return found


def unpin(cache_uri: str, run_digest: str) -> None:
    """Remove a run's pin, so that `gc` may delete its version; if the run starts again, it pins the latest version.

    Raises:
        CacheError: the run has no pin.
    """
    uri = _uri(cache_uri, run_digest)
    if not storage.exists(uri):
        raise CacheError(f"{cache_uri} has no pin of run {run_digest!r}; `meteor cache show` lists the pins")
    storage.delete(uri)


def _uri(cache_uri: str, run_digest: str) -> str:
    return storage.join(cache_uri, PINS, f"{run_digest}{_SUFFIX}")
