"""Small Arrow tables as files, rows found by a value, and numbered versions that exactly one writer publishes."""

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
    """The schema with its version, so that an older reader can refuse the file."""
    return schema.with_metadata({**(schema.metadata or {}), _SCHEMA_VERSION: str(schema_version).encode()})


def check_schema_version(uri: str, found: int, supported: int) -> None:
    """Refuse files of a newer release; older ones are read. Raises CacheError."""
    if found > supported:
        raise CacheError(
            f"{uri} has schema version {found}, this release reads up to {supported}; install a newer llava-meteor"
        )


def table_bytes(table: pa.Table) -> bytes:
    """The table as a compressed Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_table(uri: str, schema: pa.Schema, *, advice: str) -> pa.Table:
    """The columns of a `versioned` schema from a file that `table_bytes` made.

    Args:
        uri: the file.
        schema: what it must hold.
        advice: what to do about a damaged one.

    Raises:
        CorruptPayloadError: the file is damaged.
        CacheError: a newer release wrote it, or it is another table.
    """
    data = storage.read_bytes(uri)
    try:
        # Half the time of pq.read_table, which counts with thousands of ledger records; for those threads cost more than
        # they give.
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = parquet.read(use_threads=len(data) > _THREADED_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorruptPayloadError(f"{uri} is damaged ({error}); {advice}") from error
    found = (table.schema.metadata or {}).get(_SCHEMA_VERSION, b"0")
    check_schema_version(uri, int(found), int(schema.metadata[_SCHEMA_VERSION]))
    return fit_schema(table, schema, uri)


def fit_schema(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """The columns of the schema; those that an older release did not write are null.

    Raises:
        CacheError: a column is missing that may not be null.
    """
    for field in schema:
        if field.name not in table.column_names and field.nullable:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    if missing := set(schema.names) - set(table.column_names):
        raise CacheError(f"{name} lacks the columns {sorted(missing)}")
    table = table.select(schema.names)
    return table.replace_schema_metadata(schema.metadata) if table.schema.equals(schema) else table.cast(schema)


def sorted_groups(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The positions that sort the values, equal ones in their order; and where in them each distinct value starts."""
    values = values.combine_chunks()
    order = pc.sort_indices(values)
    ordered = values.take(order)
    starts = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    return order.to_numpy(), np.flatnonzero(np.concatenate([[True] * bool(len(ordered)), starts]))


class RowReader:
    """Single rows of a table in memory, much faster than slicing it; repeated strings are held once."""

    def __init__(self, table: pa.Table, *, repeated: str) -> None:
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._columns[repeated] = self._columns[repeated].dictionary_encode()

    def column(self, name: str) -> pa.Array:
        """One column."""
        return self._columns[name]

    def row(self, position: int) -> dict[str, Any]:
        """One row's values by column."""
        return {name: values[position].as_py() for name, values in self._columns.items()}

    def find_sorted(self, name: str, value: str) -> int | None:
        """The row with ``value`` in a column that is sorted and without repetition, by binary search."""
        values = self._columns[name]
        position = bisect.bisect_left(range(len(values)), value, key=lambda i: values[i].as_py())
        return position if position < len(values) and values[position].as_py() == value else None


def version_name(version: int) -> str:
    """``v00000012`` for 12."""
    return f"v{version:08d}"


def latest_version(folder_uri: str, suffix: str) -> int:
    """The highest version published in the folder as ``v00000001<suffix>`` and so on; 0 when there is none."""
    pattern = re.compile(rf"/v(\d{{8,}}){re.escape(suffix)}$")
    found = (pattern.search(info.uri) for info in storage.list_objects(folder_uri))
    return max((int(match[1]) for match in found if match), default=0)


def publish_next(folder_uri: str, suffix: str, content_after: Callable[[int], bytes | None]) -> int:
    """Publish the version after the latest; whoever loses a race looks again and builds on the winner's.

    Args:
        folder_uri: the folder of versions.
        suffix: file name extension with its dot.
        content_after: the next version's bytes, given the latest version (0: none); None when nothing would change. It
            may raise AlreadyExistsError where it sees that it would lose.

    Returns:
        The version that holds the content: the new one, or the latest when nothing changed.

    Raises:
        CacheError: other writers won every time.
    """
    for _ in range(_MAX_PUBLISH_ATTEMPTS):
        latest = latest_version(folder_uri, suffix)
        try:
            content = content_after(latest)
            if content is None:
                return latest
            storage.create_bytes(storage.join(folder_uri, f"{version_name(latest + 1)}{suffix}"), content)
        except AlreadyExistsError:
            time.sleep(random.uniform(0, _MAX_PAUSE_S))
        else:
            return latest + 1
    raise CacheError(f"{folder_uri}: {_MAX_PUBLISH_ATTEMPTS} attempts to publish lost against others; try again later")
