"""Cells of Parquet columns by row: a window of rows is in memory, so that reading in the order of the file decodes it once."""

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.errors import BadImageError, StorageError
from meteor.storage.files import open_file

# Bytes of images in one window. Threads that read in order are at most a few rows apart, which two windows cover.
_WINDOW_BYTES = 16 << 20
_NUM_WINDOWS = 2
# Columns that a process keeps open: threads that read in order are in one file or at the seam of two. Arrow holds the current
# page of each twice, and writers put up to 1,024 rows into a page: 300 MB for images of 150 kB.
_NUM_OPEN = 2
# Bytes per request while a column is read; the default is the whole row group.
_BUFFER_BYTES = 4 << 20

_OPEN: "OrderedDict[tuple[str, str, str], _Cells]" = OrderedDict()
_OPENING = threading.Lock()


def read_cell(uri: str, column: str, row: int) -> Any:
    """Return the value of a column in a row.

    Raises:
        NotFoundError: the file does not exist.
        BadImageError: the file is damaged, or has no such column or row.
    """
    cells = _open(uri, column, storage.stat(uri).etag)
    try:
        return cells.value(row)
    except (StorageError, BadImageError):
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadImageError(
            "unreadable", f"row {row} of {uri} cannot be read ({error}); copy the file again"
        ) from error


def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a Parquet file whose columns are read in pieces, not as whole row groups."""
    return pq.ParquetFile(open_file(uri), buffer_size=_BUFFER_BYTES, pre_buffer=False)


def rows_within(file: pq.ParquetFile, group: int, leaves: set[str], size_bytes: int) -> int:
    """Return the number of rows whose values of these leaf columns take about ``size_bytes``; at least 1."""
    chunks = file.metadata.row_group(group)
    columns = [chunks.column(i) for i in range(chunks.num_columns)]
    total = sum(chunk.total_uncompressed_size for chunk in columns if chunk.path_in_schema in leaves)
    return max(1, size_bytes * chunks.num_rows // max(total, 1))


def leaves_of(file: pq.ParquetFile, column: str) -> set[str]:
    """Return the paths of a column's leaf columns."""
    schema = file.metadata.schema
    paths = [schema.column(i).path for i in range(len(schema))]
    return {path for path in paths if path == column or path.startswith(f"{column}.")}


def _open(uri: str, column: str, etag: str) -> "_Cells":
    with _OPENING:
        cells = _OPEN.pop((uri, column, etag), None) or _Cells(uri, column)
        _OPEN[uri, column, etag] = cells
        while len(_OPEN) > _NUM_OPEN:
            _OPEN.popitem(last=False)
        return cells


class _Cells:
    """One column of a file, read forward from the start of a row group; a step back begins the row group again."""

    def __init__(self, uri: str, column: str) -> None:
        self._uri, self._column = uri, column
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._starts: list[int] = []
        self._group = -1
        self._next_row = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._windows: deque[tuple[int, pa.RecordBatch]] = deque(maxlen=_NUM_WINDOWS)

    def value(self, row: int) -> Any:
        with self._lock:
            start, batch = self._window(row)
        return batch.column(0)[row - start].as_py()

    def _window(self, row: int) -> tuple[int, pa.RecordBatch]:
        for start, batch in self._windows:
            if start <= row < start + len(batch):
                return start, batch
        group = self._group_of(row)
        if group == self._group + 1:
            # Another thread may be about to read the last rows of the row group.
            self._advance(self._starts[group])
        if group != self._group or row < self._next_row:
            self._begin(group)
        try:
            self._advance(row)
        except BaseException:
            # The reader cannot go on after an error, and the rows before it can be read again.
            self._group = -1
            raise
        if row >= self._next_row:
            raise self._gone(row)
        return self._windows[-1]

    def _advance(self, row: int) -> None:
        """Read windows until one holds the row, or to the end of the row group."""
        while row >= self._next_row and (batch := next(self._batches, None)) is not None:
            self._windows.append((self._next_row, batch))
            self._next_row += len(batch)

    def _group_of(self, row: int) -> int:
        if self._file is None:
            self._file = open_parquet(self._uri)
            sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            self._starts = [0, *accumulate(sizes)]
        if row >= self._starts[-1] or self._column not in self._file.schema_arrow.names:
            raise self._gone(row)
        return bisect_right(self._starts, row) - 1

    def _begin(self, group: int) -> None:
        assert self._file is not None
        rows = rows_within(self._file, group, leaves_of(self._file, self._column), _WINDOW_BYTES)
        self._group, self._next_row = group, self._starts[group]
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=[self._column], use_threads=False)

    def _gone(self, row: int) -> BadImageError:
        return BadImageError("changed", f"{self._uri} has no row {row} of {self._column!r}; run cache_features again")
