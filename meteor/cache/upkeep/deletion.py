"""Deletion of a cache's files beside readers and writers that are at work."""

import json
from contextlib import suppress

from meteor import storage
from meteor.cache.folder import DATA, LEDGER
from meteor.cache.ledger import record_of
from meteor.cache.manifest import latest_manifest, manifest_uri, read_manifest
from meteor.cache.pins import pins
from meteor.cache.upkeep.gc_plan import UNFINISHED, UNNAMED, Deletion
from meteor.errors import CacheError, NotFoundError


class Deleter:
    """Deletion of files that a plan found not needed; a file that became needed in the meantime is restored.

    Whoever makes a file count first publishes what names it (a pin, a ledger record, a manifest), and then looks for the
    file. Here the deletion comes first, and then the look for what names the file. In a race at least one of the two
    notices the other.

    Args:
        cache_uri: URI of the cache.
        latest: latest version that the plan knew.
    """

    def __init__(self, cache_uri: str, latest: int) -> None:
        self._cache_uri, self._latest = cache_uri, latest
        # Tables of the versions that were deleted: no writer is going to name them.
        self._superseded: set[str] = set()

    def delete_versions(self, files: list[str]) -> None:
        """Delete manifests.

        Raises:
            CacheError: a run has pinned one of the versions in the meantime; the version is restored.
        """
        contents: dict[str, bytes] = {}
        for uri in map(self._uri, files):
            # Another `gc` may have deleted the manifest already.
            with suppress(NotFoundError):
                contents[uri] = storage.read_bytes(uri)
            storage.delete(uri)
        for pin in pins(self._cache_uri) if files else ():
            uri = manifest_uri(self._cache_uri, pin["manifest_version"])
            if uri in contents:
                storage.write_bytes(uri, contents[uri])
                raise CacheError(
                    f"{self._cache_uri}: run {pin['run_digest']} pinned version {pin['manifest_version']} while it was "
                    "being deleted; the version is restored, and its files still exist. Run gc again"
                )
        for content in contents.values():
            # The names in a damaged manifest are unknown; its tables are looked at like any others.
            with suppress(ValueError, LookupError, TypeError):
                manifest = json.loads(content)
                self._superseded |= {manifest["keys"], manifest["quarantine"]}

    def delete(self, deletion: Deletion) -> bool:
        """Delete a file, and return whether it is gone."""
        uri = self._uri(deletion.file)
        if deletion.reason not in (UNFINISHED, UNNAMED) or deletion.file in self._superseded:
            storage.delete(uri)
            return True
        if self._is_named(deletion.file):
            return False
        try:
            content = storage.read_bytes(uri)
        except NotFoundError:
            return True
        storage.delete(uri)
        if not self._is_named(deletion.file):
            return True
        storage.write_bytes(uri, content)
        return False

    def _is_named(self, file: str) -> bool:
        if file.startswith(f"{DATA}/"):
            return storage.exists(self._uri(f"{LEDGER}/{record_of(file)}"))
        new = range(self._latest + 1, latest_manifest(self._cache_uri) + 1)
        manifests = [read_manifest(self._cache_uri, version) for version in new]
        return any(file in (manifest.keys, manifest.quarantine) for manifest in manifests)

    def _uri(self, file: str) -> str:
        return storage.join(self._cache_uri, file)
