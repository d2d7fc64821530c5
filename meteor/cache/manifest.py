"""Committed versions of a cache: its images and their places in data files, with one row per image key."""

import json
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.folder import KEYS, MANIFESTS, QUARANTINE
from meteor.cache.ledger import FEATURES_PREFIX, QUARANTINE_PREFIX, REPAIR_ADVICE, ledger_names, read_records
from meteor.cache.merging import merge_keys
from meteor.cache.quarantine import QUARANTINE_SCHEMA, merge_quarantine
from meteor.cache.row import PAYLOAD_COLUMNS
from meteor.cache.table import (
    check_schema_version,
    latest_version,
    publish_next,
    read_table,
    table_bytes,
    version_name,
)
from meteor.cache.writer import KEY_SCHEMA
from meteor.constants import CACHE_SCHEMA_VERSION
from meteor.errors import AlreadyExistsError, CacheError, CorruptPayloadError, NotFoundError

_SUFFIX = ".json"
Edit = Callable[[pa.Table], pa.Table]
# URI -> content of the tables that were written for a version.
_Tables = dict[str, bytes]


@dataclass(frozen=True)
class Manifest:
    """A committed version of a cache.

    Attributes:
        version: number of the version, from 1.
        keys: file of the key index below the cache's URI, a table with `KEY_SCHEMA` sorted by image key.
        quarantine: file of the quarantine table below the cache's URI.
        records: names of the ledger records that are merged into this version, without records that `gc` has removed.
        num_images: rows of the key index.
        num_shadowed: rows of data files that lost to another row of their image, counted since the first version.
        payload_bytes: bytes of the images' payloads.
        num_sub_images: sub-images of all images; None in versions of schema version 1.
        num_quarantined: rows of the quarantine table; None in versions of schema version 1.
        schema_version: version of the manifest's format.
    """

    version: int
    keys: str
    quarantine: str
    records: tuple[str, ...]
    num_images: int
    num_shadowed: int
    payload_bytes: int
    num_sub_images: int | None = None
    num_quarantined: int | None = None
    schema_version: int = CACHE_SCHEMA_VERSION


@dataclass(frozen=True, eq=False)
class _Base:
    """Tables and counts from which the next version is made."""

    records: frozenset[str]
    keys: pa.Table
    quarantine: pa.Table
    num_shadowed: int


_NOTHING = _Base(frozenset(), KEY_SCHEMA.empty_table(), QUARANTINE_SCHEMA.empty_table(), 0)


def manifests_uri(cache_uri: str) -> str:
    """Return the URI of the folder of manifests."""
    return storage.join(cache_uri, MANIFESTS)


def manifest_uri(cache_uri: str, version: int) -> str:
    """Return the URI of a version's manifest."""
    return storage.join(manifests_uri(cache_uri), f"{version_name(version)}{_SUFFIX}")


def latest_manifest(cache_uri: str) -> int:
    """Return the latest committed version; 0 if nothing has been committed."""
    return latest_version(manifests_uri(cache_uri), _SUFFIX)


def read_manifest(cache_uri: str, version: int) -> Manifest:
    """Read the manifest of a committed version.

    Raises:
        CorruptPayloadError: the manifest is damaged.
        CacheError: the version does not exist, or a newer release wrote it.
    """
    uri = manifest_uri(cache_uri, version)
    try:
        data = storage.read_bytes(uri)
    except NotFoundError as error:
        latest = latest_manifest(cache_uri)
        raise CacheError(f"{cache_uri} has no version {version}; the latest is {latest} (0: none yet)") from error
    try:
        content: dict[str, Any] = json.loads(data)
        check_schema_version(uri, content["schema_version"], CACHE_SCHEMA_VERSION)
        return Manifest(**{**content, "records": tuple(content["records"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptPayloadError(f"{uri} is damaged ({error}); {REPAIR_ADVICE}") from error


def read_keys(cache_uri: str, manifest: Manifest) -> pa.Table:
    """Read the key index, a table with `KEY_SCHEMA` sorted by image key."""
    return read_table(storage.join_below(cache_uri, manifest.keys), KEY_SCHEMA, advice=REPAIR_ADVICE)


def read_quarantine(cache_uri: str, manifest: Manifest) -> pa.Table:
    """Read the quarantine, a table with `QUARANTINE_SCHEMA`."""
    return read_table(storage.join_below(cache_uri, manifest.quarantine), QUARANTINE_SCHEMA, advice=REPAIR_ADVICE)


def commit(cache_uri: str, *, even_empty: bool = False) -> int:
    """Merge all ledger records that the latest version lacks into a new version.

    It is safe to call at any time from any number of processes: each record is merged once, by whichever process. If a
    process dies between a file and its commit, a later commit merges its record.

    Args:
        cache_uri: URI of the cache.
        even_empty: whether a cache without any record gets a first version too: samples of text alone need no features.

    Returns:
        The version that contains all records: a new version, or the latest if nothing was to merge (0 without any).
    """
    return _publish(
        cache_uri, lambda latest, tables: _next(cache_uri, latest, tables, even_empty=even_empty and not latest)
    )


def publish_edit(cache_uri: str, edit: Edit, *, unreadable: Collection[str] = ()) -> int:
    """Change the key index and merge pending records as `commit` does, in one new version.

    A dropped row does not come back, because its record counts as merged. A new record of its image replaces it.

    Args:
        cache_uri: URI of the cache.
        edit: function from the latest key index to the next; it is called again if another writer was faster.
        unreadable: names of damaged ledger records, which from now on count as merged without being read.

    Returns:
        The new version, or the latest if nothing would change.
    """
    return _publish(
        cache_uri, lambda latest, tables: _next(cache_uri, latest, tables, edit=edit, unreadable=unreadable)
    )


def rebuild(cache_uri: str, broken_version: int, *, unreadable: Collection[str] = ()) -> int:
    """Publish a version from all ledger records alone, after a latest version that cannot be read.

    Returns:
        The new version, or the latest if another process has published a version after the broken one.
    """

    def content_after(latest: int, tables: _Tables) -> bytes | None:
        if latest != broken_version:
            return None
        return _next(cache_uri, latest, tables, base=_NOTHING, unreadable=unreadable)

    return _publish(cache_uri, content_after)


def _publish(cache_uri: str, content_after: Callable[[int, _Tables], bytes | None]) -> int:
    tables: _Tables = {}

    def content(latest: int) -> bytes | None:
        tables.clear()
        return content_after(latest, tables)

    version = publish_next(manifests_uri(cache_uri), _SUFFIX, content)
    # `gc` deletes a table that no manifest names, and then looks for new manifests. Here the manifest comes first and then
    # the look for its tables, so in a race at least one of the two notices the other.
    for uri, data in tables.items():
        if not storage.exists(uri):
            storage.write_bytes(uri, data)
    return version


def _base(cache_uri: str, manifest: Manifest | None) -> _Base:
    if manifest is None:
        return _NOTHING
    return _Base(
        frozenset(manifest.records),
        read_keys(cache_uri, manifest),
        read_quarantine(cache_uri, manifest),
        manifest.num_shadowed,
    )


def _next(
    cache_uri: str,
    latest: int,
    tables: _Tables,
    *,
    base: _Base | None = None,
    edit: Edit | None = None,
    unreadable: Collection[str] = (),
    even_empty: bool = False,
) -> bytes | None:
    """Write the next version's tables, add them to ``tables``, and return its manifest; None if it would change nothing."""
    listed = ledger_names(cache_uri)
    if base is None:
        manifest = read_manifest(cache_uri, latest) if latest else None
        # Nearly every call ends here, before the large tables are read.
        if manifest and not edit and set(manifest.records).issuperset(listed):
            return None
        base = _base(cache_uri, manifest)
    pending = [name for name in listed if name not in base.records]
    readable = [name for name in pending if name not in unreadable]
    new_rows = _pending_tables(cache_uri, [name for name in readable if name.startswith(FEATURES_PREFIX)])
    new_bad = _pending_tables(cache_uri, [name for name in readable if name.startswith(QUARANTINE_PREFIX)])
    edited = edit(base.keys) if edit else base.keys
    if not pending and not even_empty and edited.equals(base.keys):
        return None
    keys = merge_keys(edited, new_rows)
    num_lost = edited.num_rows + sum(table.num_rows for table in new_rows) - keys.num_rows
    return _write_version(
        cache_uri,
        latest + 1,
        tables,
        keys,
        merge_quarantine(base.quarantine, new_bad, keys["image_key"]),
        # A record that `gc` has removed cannot be merged again, so its name need not be kept.
        records=(base.records | set(pending)) & set(listed),
        num_shadowed=base.num_shadowed + num_lost,
    )


def _pending_tables(cache_uri: str, names: Sequence[str]) -> list[pa.Table]:
    # `gc` removes only merged records. If a record is gone since the listing, a later version exists that has merged it,
    # and the conditional put of this version is going to fail.
    contents = read_records(cache_uri, names)
    if damaged := [content for content in contents.values() if isinstance(content, CorruptPayloadError)]:
        raise CorruptPayloadError(
            f"{len(damaged)} ledger records are damaged, such as: {damaged[0]}. The repair leaves them out, and the next "
            "build encodes their images again"
        ) from damaged[0]
    return list(contents.values())


def _write_version(
    cache_uri: str,
    version: int,
    tables: _Tables,
    keys: pa.Table,
    quarantine: pa.Table,
    *,
    records: Collection[str],
    num_shadowed: int,
) -> bytes:
    """Write the tables of a version, and return the manifest, which makes the version visible once it is published."""
    # If others have published during the merge, this version has lost, and its tables would be waste for `gc`.
    if latest_manifest(cache_uri) >= version:
        raise AlreadyExistsError(f"{cache_uri} has a version {version} already")
    # Random names, so that a writer that loses the race for the manifest overwrites no table of the winner.
    name = f"{version_name(version)}-{uuid.uuid4().hex}.parquet"
    tables[storage.join(cache_uri, KEYS, name)] = table_bytes(keys)
    tables[storage.join(cache_uri, QUARANTINE, name)] = table_bytes(quarantine)
    for uri, data in tables.items():
        storage.write_bytes(uri, data)
    manifest = Manifest(
        version=version,
        keys=f"{KEYS}/{name}",
        quarantine=f"{QUARANTINE}/{name}",
        records=tuple(sorted(records)),
        num_images=keys.num_rows,
        num_shadowed=num_shadowed,
        payload_bytes=sum(pc.sum(keys[f"{column}_size"]).as_py() or 0 for column in PAYLOAD_COLUMNS),
        # Each patch grid is two numbers of the list.
        num_sub_images=(pc.sum(pc.list_value_length(keys["patch_grids"])).as_py() or 0) // 2,
        num_quarantined=quarantine.num_rows,
    )
    return storage.json_bytes(asdict(manifest))
