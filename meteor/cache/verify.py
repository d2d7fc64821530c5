"""Checks of a cache's version: page checksums, row checksums, and the agreement of the key index with the data files."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.cache.codec import Codec
from meteor.cache.folder import DATA, read_cache_info
from meteor.cache.row import IMAGE_FIELDS, PAYLOAD_COLUMNS, payload_crc32, read_row
from meteor.cache.table import fit_schema, sorted_groups
from meteor.cache.writer import file_metadata
from meteor.errors import CacheError, NotFoundError, StorageError

_IMAGE_SCHEMA = pa.schema(IMAGE_FIELDS)
_NUM_THREADS = 8
_MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class Problem:
    """A contradiction between a data file and the key index.

    Attributes:
        file: name of the data file below the cache's URI.
        image_key: key of the damaged image; None if all images of the file are affected.
        message: description of the problem.
        proven: False if the store did not deliver the file, which may still be intact.
    """

    file: str
    image_key: str | None
    message: str
    proven: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {f'image {self.image_key}: ' if self.image_key else ''}{self.message}"


def verify_files(
    cache_uri: str, index: pa.Table, codec: Codec, *, on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Return the problems that `find_problems` finds as lines."""
    return [str(problem) for problem in find_problems(cache_uri, index, codec, on_progress=on_progress)]


def find_problems(
    cache_uri: str,
    index: pa.Table,
    codec: Codec,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    max_bytes: int = _MAX_BYTES,
) -> list[Problem]:
    """Find the problems of all rows in the key index, ordered by file; other rows of the files are not checked.

    Whole files are read, as many at once as fit into ``max_bytes``.

    Args:
        cache_uri: URI of the cache.
        index: the cache's key index, or some of its rows.
        codec: the cache's codec.
        on_progress: called with the number of finished files and of all files.
        max_bytes: memory for files; a larger file is read alone.
    """
    order, starts = sorted_groups(index["file"])
    positions = np.split(order, starts[1:]) if len(order) else []
    metadata = file_metadata(read_cache_info(cache_uri), codec)
    # The largest file decides, because the threads may all read files of its size at once.
    sizes = [info.size_bytes for info in storage.list_objects(storage.join(cache_uri, DATA))]
    num_threads = max(1, min(_NUM_THREADS, max_bytes // max(sizes, default=1)))

    def check(rows: np.ndarray) -> list[Problem]:
        entries = index.take(rows).to_pylist()
        return list(_problems_of_file(cache_uri, entries, codec, metadata))

    problems: list[Problem] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for num_done, found in enumerate(pool.map(check, positions), start=1):
            problems += found
            if on_progress:
                on_progress(num_done, len(positions))
    return problems


def _problems_of_file(
    cache_uri: str, entries: list[dict[str, Any]], codec: Codec, metadata: dict[str, str]
) -> Iterator[Problem]:
    file = entries[0]["file"]
    try:
        data = storage.read_bytes(storage.join(cache_uri, file))
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (StorageError, pa.ArrowException, OSError) as error:
        # A store that does not answer has not lost the file, so a repair must not drop its images.
        proven = isinstance(error, NotFoundError) or not isinstance(error, StorageError)
        yield Problem(file, None, f"cannot be read ({error}); {len(entries)} images are lost", proven)
        return
    found = {name.decode(): value.decode() for name, value in (parquet.schema_arrow.metadata or {}).items()}
    for name, value in metadata.items():
        if found.get(name) != value:
            yield Problem(
                file, None, f"was written for another cache: {name} {found.get(name)}, this cache has {value}"
            )
    for entry in entries:
        for message in _problems_of_image(parquet, memoryview(data), entry, codec):
            yield Problem(file, entry["image_key"], message)


def _problems_of_image(parquet: pq.ParquetFile, data: memoryview, entry: dict[str, Any], codec: Codec) -> Iterator[str]:
    """Check the bytes that `get` reads, then the row in the form in which other Parquet readers see it."""
    ranges = [(entry[f"{column}_offset"], entry[f"{column}_size"]) for column in PAYLOAD_COLUMNS]
    if payload_crc32(*(data[start : start + size] for start, size in ranges)) != entry["crc32"]:
        yield f"the bytes in the ranges {ranges} do not match the checksum in the key index"
    if entry["row_group"] >= parquet.num_row_groups:
        yield f"the key index names row group {entry['row_group']} of {parquet.num_row_groups}"
        return
    try:
        row = parquet.read_row_group(entry["row_group"])
        image_fields = fit_schema(row, _IMAGE_SCHEMA, "the row").to_pylist()[0]
        read_row(row, 0, codec)
    except (CacheError, pa.ArrowException, OSError) as error:
        yield str(error)
        return
    for field, value in image_fields.items():
        if entry[field] != value:
            yield f"the key index says {field} {entry[field]}, the file says {value}"
