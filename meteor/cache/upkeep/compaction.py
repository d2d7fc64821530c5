"""Compaction of data files with many dead rows: live rows move to a new file, so that `gc` can delete the old file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.cache.ledger import read_record, record_of
from meteor.cache.manifest import latest_manifest, publish_edit, read_keys, read_manifest
from meteor.cache.row import FEATURE_SCHEMA
from meteor.cache.table import fit_schema
from meteor.cache.upkeep.usage import Usage, payload_bytes_by_file
from meteor.cache.writer import write_feature_file
from meteor.errors import CacheError, NotFoundError, StorageError

# A file with a smaller share of dead bytes stays, because moving its rows would cost more than the space is worth.
MIN_DEAD_SHARE = 0.25


@dataclass(frozen=True)
class Compaction:
    """A data file to compact.

    Attributes:
        file: name of the file below the cache's URI.
        size_bytes: size of the file.
        dead_bytes: bytes of payloads that the latest version does not use.
    """

    file: str
    size_bytes: int
    dead_bytes: int


def plan_compactions(usage: Usage) -> Iterator[Compaction]:
    """Find old data files with at least `MIN_DEAD_SHARE` of dead bytes; files that a pin keeps are left out."""
    for file, live_bytes in sorted(usage.live_bytes.items()):
        info = usage.files.get(file)
        if info is None or file in usage.needed_by_others or not usage.is_old(file):
            continue
        # The size alone shows that most files have few dead bytes; only for the others is the ledger record read.
        if info.size_bytes - live_bytes < MIN_DEAD_SHARE * info.size_bytes:
            continue
        try:
            record = read_record(usage.cache_uri, record_of(file))
        except (CacheError, NotFoundError):
            # Without its record the file's dead bytes are unknown; `repair` reports the missing record.
            continue
        total_bytes = payload_bytes_by_file(record).get(file, 0)
        if total_bytes - live_bytes >= MIN_DEAD_SHARE * total_bytes > 0:
            yield Compaction(file, info.size_bytes, total_bytes - live_bytes)


def compact(cache_uri: str, files: Sequence[str]) -> tuple[int, int, list[str]]:
    """Write the live rows of each file to a new file, then publish a version that uses the new files.

    After a crash in between, the old rows stay in use, and the next `gc` deletes their copies.

    Returns:
        The version, the number of compacted files, and a line for each file that could not be compacted.
    """
    latest = latest_manifest(cache_uri)
    if not files:
        return latest, 0, []
    keys = read_keys(cache_uri, read_manifest(cache_uri, latest))
    moved, failures = [], []
    for file in files:
        rows = keys.filter(pc.equal(keys["file"], file))
        try:
            record = write_feature_file(cache_uri, _live_rows(cache_uri, file, rows["row_group"].to_pylist()))
        except (CacheError, StorageError, pa.ArrowException, OSError) as error:
            failures.append(f"{file} cannot be compacted ({error}); see `meteor cache verify`")
            continue
        places = _places(file, record.rows["image_key"])
        moved.append(record.rows.append_column("moved_from", places))
    if not moved:
        return latest, 0, failures
    return publish_edit(cache_uri, lambda held: _at_new_places(held, pa.concat_tables(moved))), len(moved), failures


def _live_rows(cache_uri: str, file: str, row_groups: Sequence[int]) -> Iterator[pa.Table]:
    data = storage.read_bytes(storage.join(cache_uri, file))
    parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    # A row group is an image, so this keeps the memory of a single image besides the file.
    for row_group in row_groups:
        yield fit_schema(parquet.read_row_group(row_group), FEATURE_SCHEMA, file)


def _at_new_places(held: pa.Table, moved: pa.Table) -> pa.Table:
    """Return the key index with moved rows pointing to their new files; rows that changed in the meantime stay."""
    found = pc.index_in(_places(held["file"], held["image_key"]), value_set=moved["moved_from"].combine_chunks())
    positions = pc.if_else(
        pc.is_null(found), pa.array(range(held.num_rows), pa.int64()), pc.add(found.cast(pa.int64()), held.num_rows)
    )
    return pa.concat_tables([held, moved.drop_columns("moved_from")]).take(positions)


def _places(file: str | pa.ChunkedArray, image_keys: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(file, image_keys, " ")
