"""Usage of a cache's files: the references by which `gc` decides."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.folder import MANIFESTS
from meteor.cache.manifest import Manifest, manifest_uri, read_keys, read_manifest
from meteor.cache.pins import pins
from meteor.cache.row import PAYLOAD_COLUMNS
from meteor.errors import CacheError, NotFoundError

_MANIFEST = re.compile(rf"{MANIFESTS}/v(\d{{8,}})\.json")


@dataclass(frozen=True)
class Usage:
    """The files below a cache's URI and the references to them.

    Attributes:
        cache_uri: URI of the cache.
        before_s: time before which a file must be written to be old, in epoch seconds.
        files: all files, by name below the cache's URI.
        latest: the latest version; 0 if there is none.
        kept_versions: version -> reason, for each version that must stay.
        named: manifests of the kept versions, and all files that they name.
        merged: names of the ledger records that the latest version includes.
        live_bytes: data file -> payload bytes that the latest version uses from it.
        needed_by_others: data files that a pinned version other than the latest names.
    """

    cache_uri: str
    before_s: float
    files: Mapping[str, storage.ObjectInfo]
    latest: int
    kept_versions: Mapping[int, str]
    named: frozenset[str]
    merged: frozenset[str]
    live_bytes: Mapping[str, int]
    needed_by_others: frozenset[str]

    def is_old(self, file: str) -> bool:
        """Return whether the file is old; a file that is gone counts as old."""
        return file not in self.files or self.files[file].modified_s <= self.before_s


def read_usage(cache_uri: str, *, before_s: float) -> Usage:
    """List the cache once, and read the key index of every version that must stay.

    Raises:
        CacheError: a version that must stay is damaged, so its files are unknown.
        StorageError: a pin is damaged.
    """
    start = len(storage.join(cache_uri, ""))
    # Pins are read after the listing, so that no earlier pin of a listed version is missed.
    files = {info.uri[start:]: info for info in storage.list_objects(cache_uri)}
    pinned: dict[int, list[str]] = {}
    for pin in pins(cache_uri):
        pinned.setdefault(pin["manifest_version"], []).append(pin["run_digest"])
    written_s = {int(match[1]): info.modified_s for file, info in files.items() if (match := _MANIFEST.fullmatch(file))}
    kept_versions = _kept_versions(written_s, pinned, before_s)
    latest = max(written_s, default=0)
    named: set[str] = set()
    others: set[str] = set()
    live_bytes: dict[str, int] = {}
    merged: tuple[str, ...] = ()
    for version in kept_versions:
        manifest, bytes_by_file = _read_version(cache_uri, version)
        uri = manifest_uri(cache_uri, version)
        named |= {uri[start:], manifest.keys, manifest.quarantine, *bytes_by_file}
        if version == latest:
            live_bytes, merged = bytes_by_file, manifest.records
        elif version in pinned:
            others |= bytes_by_file.keys()
    return Usage(
        cache_uri=cache_uri,
        before_s=before_s,
        files=files,
        latest=latest,
        kept_versions=kept_versions,
        named=frozenset(named),
        merged=frozenset(merged),
        live_bytes=live_bytes,
        needed_by_others=frozenset(others),
    )


def _kept_versions(
    written_s: Mapping[int, float], pinned: Mapping[int, Iterable[str]], before_s: float
) -> dict[int, str]:
    kept, next_written_s = {}, math.inf
    for version in sorted(written_s, reverse=True):
        if next_written_s == math.inf:
            kept[version] = "the latest"
        elif version in pinned:
            kept[version] = f"pinned by {', '.join(pinned[version])}"
        # The negation keeps a version whose time is unknown (nan).
        elif not next_written_s <= before_s:
            kept[version] = "superseded a short while ago"
        next_written_s = written_s[version]
    return kept


def _read_version(cache_uri: str, version: int) -> tuple[Manifest, dict[str, int]]:
    try:
        manifest = read_manifest(cache_uri, version)
        keys = read_keys(cache_uri, manifest)
    except (CacheError, NotFoundError) as error:
        raise CacheError(
            f"{cache_uri}: version {version} must be kept but cannot be read ({error}), so its files are unknown and "
            "nothing was deleted. If it is the latest, run `meteor cache verify --repair`; if it has pins, remove them; "
            "otherwise wait until it was superseded long enough ago"
        ) from error
    return manifest, payload_bytes_by_file(keys)


def payload_bytes_by_file(keys: pa.Table) -> dict[str, int]:
    """Sum the payload bytes of a key index's rows by data file."""
    sizes = [keys[f"{column}_size"] for column in PAYLOAD_COLUMNS]
    total = pc.add(pc.add(sizes[0], sizes[1]), sizes[2])
    sums = pa.table({"file": keys["file"], "bytes": total}).group_by("file").aggregate([("bytes", "sum")])
    return dict(zip(sums["file"].to_pylist(), sums["bytes_sum"].to_pylist(), strict=True))
