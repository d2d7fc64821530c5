"""Checks of everything a version of a cache names: page checksums, row checksums, and the key index against both."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.cache.codec import Codec
from meteor.cache.row import IMAGE_FIELDS, PAYLOAD_COLUMNS, payload_crc32, read_row
from meteor.errors import CacheError, StorageError


def verify_files(cache_uri: str, index: pa.Table, codec: Codec) -> list[str]:
    """One line for each problem of the data files that the key index names. Whole files are read, one after another."""
    problems: list[str] = []
    for file in sorted(pc.unique(index["file"]).to_pylist()):
        entries = index.filter(pc.equal(index["file"], file)).to_pylist()
        problems += [f"{file}: {problem}" for problem in _problems_of_file(cache_uri, file, entries, codec)]
    return problems


def _problems_of_file(cache_uri: str, file: str, entries: list[dict[str, Any]], codec: Codec) -> Iterator[str]:
    try:
        data = storage.read_bytes(storage.join(cache_uri, file))
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (StorageError, pa.ArrowException, OSError) as error:
        yield f"cannot be read ({error}); {len(entries)} images are lost"
        return
    by_group = {entry["row_group"]: entry for entry in entries}
    for group in range(parquet.num_row_groups):
        yield from _problems_of_row(parquet, group, by_group.get(group), codec)
    for entry in entries:
        yield from _problems_of_entry(entry, parquet.num_row_groups, memoryview(data))


def _problems_of_row(parquet: pq.ParquetFile, group: int, entry: dict[str, Any] | None, codec: Codec) -> Iterator[str]:
    name = f"image {entry['image_key']}" if entry else f"shadowed row {group}"
    try:
        row = parquet.read_row_group(group)
        image_fields = row.select([field.name for field in IMAGE_FIELDS]).to_pylist()[0]
        read_row(row, 0, codec)
    except (CacheError, pa.ArrowException, OSError) as error:
        yield f"{name}: {error}"
        return
    for field, value in image_fields.items():
        if entry and entry[field] != value:
            yield f"{name}: the key index says {field} {entry[field]}, the file says {value}"


def _problems_of_entry(entry: dict[str, Any], num_row_groups: int, data: memoryview) -> Iterator[str]:
    name = f"image {entry['image_key']}"
    if entry["row_group"] >= num_row_groups:
        yield f"{name}: the key index names row group {entry['row_group']} of {num_row_groups}"
    ranges = [(entry[f"{column}_offset"], entry[f"{column}_size"]) for column in PAYLOAD_COLUMNS]
    if payload_crc32(*(data[start : start + size] for start, size in ranges)) != entry["crc32"]:
        yield f"{name}: the bytes in the ranges {ranges} do not match the checksum in the key index"
