"""Committed versions of a cache: which images it holds and where, one winner for each image key."""

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.folder import KEYS, LEDGER, MANIFESTS, QUARANTINE
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
from meteor.errors import CacheError, NotFoundError

_NUM_READERS = 16


@dataclass(frozen=True)
class Manifest:
    """One committed version.

    Attributes:
        version: its number, from 1 on.
        keys: file of the key index below the cache's URI, a table of `KEY_SCHEMA` sorted by image key.
        quarantine: file of the quarantine table.
        records: names of all ledger records that are merged into this version.
        num_images: rows of the key index.
        num_shadowed: rows of data files that lost to another row of the same image.
        payload_bytes: bytes of the images' payloads.
    """

    version: int
    keys: str
    quarantine: str
    records: tuple[str, ...]
    num_images: int
    num_shadowed: int
    payload_bytes: int
    schema_version: int = CACHE_SCHEMA_VERSION


def latest_manifest(cache_uri: str) -> int:
    """The latest committed version; 0 when nothing has been committed."""
    return latest_version(storage.join(cache_uri, MANIFESTS), ".json")


def read_manifest(cache_uri: str, version: int) -> Manifest:
    """A committed version.

    Raises:
        CacheError: there is no such version, or a newer release wrote it.
    """
    uri = storage.join(cache_uri, MANIFESTS, f"{version_name(version)}.json")
    try:
        content: dict[str, Any] = storage.read_json(uri)
    except NotFoundError as error:
        latest = latest_manifest(cache_uri)
        raise CacheError(f"{cache_uri} has no version {version}; the latest is {latest} (0: none yet)") from error
    check_schema_version(uri, content["schema_version"], CACHE_SCHEMA_VERSION)
    return Manifest(**{**content, "records": tuple(content["records"])})


def commit(cache_uri: str) -> int:
    """Merge all ledger records that no version holds yet into a new version.

    Safe to call at any time from any number of processes: each record is merged once, whoever merges it, and a process
    that died between a file and its commit loses nothing.

    Returns:
        The version that holds all of them; the latest as it was when there was nothing to merge (0: none at all).
    """
    return publish_next(storage.join(cache_uri, MANIFESTS), ".json", lambda latest: _manifest_after(cache_uri, latest))


def read_keys(cache_uri: str, manifest: Manifest) -> pa.Table:
    """The key index, a table of `KEY_SCHEMA` sorted by image key."""
    return read_table(storage.join(cache_uri, manifest.keys), KEY_SCHEMA)


def read_quarantine(cache_uri: str, manifest: Manifest) -> pa.Table:
    """The quarantine, a table of `QUARANTINE_SCHEMA`."""
    return read_table(storage.join(cache_uri, manifest.quarantine), QUARANTINE_SCHEMA)


def merge_keys(held: pa.Table, pending: Sequence[pa.Table]) -> pa.Table:
    """One row for each image key, sorted by key: the first that was there, so that a committed row stays where it is.

    A later row replaces it only by holding the attention of more layers, all earlier ones included: so a cache grows
    when a new experiment asks for another layer.
    """
    rows = pa.concat_tables([held, *pending])
    keys, layers = rows["image_key"].to_pylist(), rows["attention_layers"].to_pylist()
    winners: dict[str, int] = {}
    for position, key in enumerate(keys):
        winner = winners.setdefault(key, position)
        if set(layers[position]) > set(layers[winner]):
            winners[key] = position
    return rows.take(pa.array([winners[key] for key in sorted(winners)], pa.int64()))


def _manifest_after(cache_uri: str, latest: int) -> bytes | None:
    previous = read_manifest(cache_uri, latest) if latest else None
    merged_records = set(previous.records) if previous else set()
    listed = [info.uri.rpartition("/")[2] for info in storage.list_objects(storage.join(cache_uri, LEDGER))]
    pending = [name for name in listed if name not in merged_records]
    if not pending:
        return None
    held_keys = read_keys(cache_uri, previous) if previous else KEY_SCHEMA.empty_table()
    held_quarantine = read_quarantine(cache_uri, previous) if previous else QUARANTINE_SCHEMA.empty_table()
    new_rows = _read_records(cache_uri, [name for name in pending if name.startswith("features-")], KEY_SCHEMA)
    new_bad = _read_records(cache_uri, [name for name in pending if name.startswith("quarantine-")], QUARANTINE_SCHEMA)
    keys = merge_keys(held_keys, new_rows)
    quarantine = merge_quarantine(held_quarantine, new_bad, keys["image_key"].to_pylist())
    num_rows = held_keys.num_rows + sum(table.num_rows for table in new_rows)
    # Named by chance, so that a writer who loses the race to the manifest overwrites nothing.
    name = f"{version_name(latest + 1)}-{uuid.uuid4().hex}.parquet"
    storage.write_bytes(storage.join(cache_uri, KEYS, name), table_bytes(keys))
    storage.write_bytes(storage.join(cache_uri, QUARANTINE, name), table_bytes(quarantine))
    manifest = Manifest(
        version=latest + 1,
        keys=f"{KEYS}/{name}",
        quarantine=f"{QUARANTINE}/{name}",
        records=tuple(sorted(merged_records.union(pending))),
        num_images=keys.num_rows,
        num_shadowed=(previous.num_shadowed if previous else 0) + num_rows - keys.num_rows,
        payload_bytes=sum(pc.sum(keys[f"{column}_size"]).as_py() or 0 for column in PAYLOAD_COLUMNS),
    )
    return storage.json_bytes(asdict(manifest))


def _read_records(cache_uri: str, names: Sequence[str], schema: pa.Schema) -> list[pa.Table]:
    uris = [storage.join(cache_uri, LEDGER, name) for name in names]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(lambda uri: read_table(uri, schema), uris))
