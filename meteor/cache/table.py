"""Arrow tables as files, search for rows by a value, and numbered versions, each published by exactly one writer."""

import bisect
import io
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meteor import storage
from meteor.errors import AlreadyExistsError, CacheError, CorruptPayloadError

_SCHEMA_VERSION = b"meteor_schema_version"
_MAX_PUBLISH_ATTEMPTS = 100
_MAX_PAUSE_S = 0.05
_THREADED_READ_BYTES = 1 << 20


def versioned(schema: pa.Schema, schema_version: int) -> pa.Schema:
    """Add a version to the schema, so that an older reader can refuse the file."""
    return schema.with_metadata({**(schema.metadata or {}), _SCHEMA_VERSION: str(schema_version).encode()})


def check_schema_version(uri: str, found: int, supported: int) -> None:
    """Refuse files of a newer release. Raises CacheError."""
    if found > supported:
        raise CacheError(
            f"{uri} has schema version {found}, this release reads up to {supported}; install a newer llava-meteor"
        )


def table_bytes(table: pa.Table) -> bytes:
    """Encode the table as a compressed Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_table(uri: str, schema: pa.Schema, *, advice: str) -> pa.Table:
    """Read the columns of a `versioned` schema from a file that `table_bytes` made.

    Args:
        uri: URI of the file.
        schema: schema of the table.
        advice: remedy for a damaged file, which ends the error message.

    Raises:
        CorruptPayloadError: the file is damaged.
        CacheError: a newer release wrote the file, or it holds another table.
    """
    data = storage.read_bytes(uri)
    try:
        # This takes half the time of `pq.read_table`, which matters for thousands of ledger records. For small files,
        # starting threads costs more time than they save.
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = parquet.read(use_threads=len(data) > _THREADED_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorruptPayloadError(f"{uri} is damaged ({error}); {advice}") from error
    found = (table.schema.metadata or {}).get(_SCHEMA_VERSION, b"0")
    check_schema_version(uri, int(found), int(schema.metadata[_SCHEMA_VERSION]))
    return fit_schema(table, schema, uri)


def fit_schema(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """Select the columns of the schema; nullable columns that an older release did not write are null.

    Raises:
        CacheError: a column that may not be null is missing.
    """
    for field in schema:
        if field.name not in table.column_names and field.nullable:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    if missing := set(schema.names) - set(table.column_names):
        raise CacheError(f"{name} lacks the columns {sorted(missing)}")
    table = table.select(schema.names)
    return table.replace_schema_metadata(schema.metadata) if table.schema.equals(schema) else table.cast(schema)


def sorted_groups(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Group equal values.

    Returns:
        The positions that sort the values, with equal values in their order; and the start of each distinct value's group
        in these positions.
    """
    values = values.combine_chunks()
    order = pc.sort_indices(values)
    ordered = values.take(order)
    starts = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    return order.to_numpy(), np.flatnonzero(np.concatenate([[True] * bool(len(ordered)), starts]))


class RowReader:
    """Fast access to single rows of a table in memory; each distinct string of the column ``repeated`` is stored once."""

    def __init__(self, table: pa.Table, *, repeated: str) -> None:
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._columns[repeated] = self._columns[repeated].dictionary_encode()

    def column(self, name: str) -> pa.Array:
        """Return a column."""
        return self._columns[name]

    def row(self, position: int) -> dict[str, Any]:
        """Return the values of a row by column name."""
        return {name: values[position].as_py() for name, values in self._columns.items()}

    def find_sorted(self, name: str, value: str) -> int | None:
        """Find the row with ``value`` in a sorted column without repeats by binary search; return None if there is none."""
        values = self._columns[name]
        position = bisect.bisect_left(range(len(values)), value, key=lambda i: values[i].as_py())
        return position if position < len(values) and values[position].as_py() == value else None


def version_name(version: int) -> str:
    """Return the name of a version, for example ``v00000012`` for 12."""
    return f"v{version:08d}"


def latest_version(folder_uri: str, suffix: str) -> int:
    """Return the highest version in the folder with names like ``v00000001<suffix>``; 0 if there is none."""
    pattern = re.compile(rf"/v(\d{{8,}}){re.escape(suffix)}$")
    found = (pattern.search(info.uri) for info in storage.list_objects(folder_uri))
    return max((int(match[1]) for match in found if match), default=0)


def publish_next(folder_uri: str, suffix: str, content_after: Callable[[int], bytes | None]) -> int:
    """Publish the version after the latest; a writer that loses a race tries again after the winner's version.

    Args:
        folder_uri: folder of the versions.
        suffix: file name extension with its dot.
        content_after: function from the latest version (0 for none) to the next version's bytes, or None if nothing would
            change. It may raise AlreadyExistsError when it finds that another writer has won.

    Returns:
        The version with the content: the new version, or the latest if nothing changed.

    Raises:
        CacheError: other writers won in every attempt.
    """
    for _ in range(_MAX_PUBLISH_ATTEMPTS):
        latest = latest_version(folder_uri, suffix)
        try:
            content = content_after(latest)
            if content is None:
                return latest
            storage.create_bytes(storage.join(folder_uri, f"{version_name(latest + 1)}{suffix}"), content)
        except AlreadyExistsError:
            # A random pause separates writers that would otherwise meet again.
            time.sleep(random.uniform(0, _MAX_PAUSE_S))
        else:
            return latest + 1
    raise CacheError(
        f"{folder_uri}: {_MAX_PUBLISH_ATTEMPTS} attempts to publish lost against other writers; try again later"
    )
