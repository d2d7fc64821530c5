"""Listing of all caches below a root, including damaged caches: their content, size and pins."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from meteor import storage
from meteor.cache.folder import IDENTITY, MANIFESTS, PINS, read_cache_info
from meteor.cache.identity import CacheIdentity
from meteor.cache.manifest import Manifest, read_keys, read_manifest, read_quarantine
from meteor.errors import CacheError, StorageError
from meteor.formatting import format_bytes

# A file's path below the root: <cache key>/<codec>/<file>.
_FILE = re.compile(r"([0-9a-f]{64})/([^/]+)/(.+)")
_MANIFEST = re.compile(rf"{MANIFESTS}/v(\d{{8,}})\.json")


@dataclass(frozen=True)
class CacheListing:
    """A cache in the listing.

    Attributes:
        uri: ``<root>/<key>/<codec>``.
        key, codec: cache key and codec from the path.
        num_files, stored_bytes: number and size of all files below the URI.
        created_s, modified_s: times of the first and the last write, in epoch seconds.
        num_pins: number of runs that pin a version.
        version: the latest version; 0 if nothing has been committed.
        num_images, num_sub_images, payload_bytes, num_quarantined: counts of the latest version.
        identity: identity of the features; None if it cannot be read.
        error: reason why a part of the cache cannot be read; empty if all parts can.
    """

    uri: str
    key: str
    codec: str
    num_files: int
    stored_bytes: int
    created_s: float
    modified_s: float
    num_pins: int
    version: int = 0
    num_images: int = 0
    num_sub_images: int = 0
    payload_bytes: int = 0
    num_quarantined: int = 0
    identity: CacheIdentity | None = field(default=None, repr=False)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {**vars(self), "identity": self.identity.to_dict() if self.identity else None}

    def to_text(self) -> str:
        """Return a line for people, and a second line if there is an error."""
        written = datetime.fromtimestamp(self.modified_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        line = (
            f"{self.uri}  version {self.version}, {self.num_images:,} images, {self.num_sub_images:,} sub-images, "
            f"{format_bytes(self.stored_bytes)}, {self.num_quarantined:,} quarantined, {self.num_pins} pins, written {written}"
        )
        return f"{line}\n  {self.error}" if self.error else line


def list_caches(root_uri: str) -> list[CacheListing]:
    """List every cache below the root, sorted by URI; this lists the root once and reads two small files per cache."""
    root_uri = storage.absolute(root_uri)
    start = len(storage.join(root_uri, ""))
    caches: dict[tuple[str, str], dict[str, storage.ObjectInfo]] = {}
    for info in storage.list_objects(root_uri):
        if match := _FILE.fullmatch(info.uri[start:]):
            caches.setdefault((match[1], match[2]), {})[match[3]] = info
    return [_listing(root_uri, key, codec, files) for (key, codec), files in sorted(caches.items())]


def _listing(root_uri: str, key: str, codec: str, files: Mapping[str, storage.ObjectInfo]) -> CacheListing:
    uri = storage.join(root_uri, key, codec)
    written_s = [info.modified_s for info in files.values()]
    known: dict[str, object] = {}
    errors = []
    try:
        if IDENTITY not in files:
            raise CacheError(f"{uri} lacks {IDENTITY}")
        info = read_cache_info(uri)
        known["identity"] = info.identity
        if (info.identity.key, info.codec) != (key, codec):
            raise CacheError(f"{uri} holds the features of cache {info.identity.key} in {info.codec}: it was moved")
    except (CacheError, StorageError, KeyError, TypeError) as error:
        errors.append(str(error) or repr(error))
    try:
        known |= _latest(uri, files)
    except (CacheError, StorageError) as error:
        errors.append(str(error))
    return CacheListing(
        uri=uri,
        key=key,
        codec=codec,
        num_files=len(files),
        stored_bytes=sum(info.size_bytes for info in files.values()),
        created_s=min(written_s),
        modified_s=max(written_s),
        num_pins=sum(name.startswith(f"{PINS}/") for name in files),
        error="; ".join(errors),
        **known,  # type: ignore[arg-type]
    )


def _latest(uri: str, files: Iterable[str]) -> dict[str, int]:
    """Return the fields of the latest version."""
    version = max((int(match[1]) for name in files if (match := _MANIFEST.fullmatch(name))), default=0)
    if not version:
        return {}
    manifest = read_manifest(uri, version)
    num_sub_images, num_quarantined = _counts(uri, manifest)
    return {
        "version": version,
        "num_images": manifest.num_images,
        "num_sub_images": num_sub_images,
        "payload_bytes": manifest.payload_bytes,
        "num_quarantined": num_quarantined,
    }


def _counts(uri: str, manifest: Manifest) -> tuple[int, int]:
    """Return the numbers of sub-images and quarantined images, counted if a manifest of schema version 1 lacks them."""
    if manifest.num_sub_images is not None and manifest.num_quarantined is not None:
        return manifest.num_sub_images, manifest.num_quarantined
    grids = read_keys(uri, manifest)["patch_grids"]
    return (pc.sum(pc.list_value_length(grids)).as_py() or 0) // 2, read_quarantine(uri, manifest).num_rows
