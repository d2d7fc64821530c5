"""Rows of Parquet files as records: columns of text are read, and images become names without being loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor.data.data_files import FORMS_ADVICE
from meteor.data.forms import DIALOGUE_KEYS, IMAGE_KEYS, looks_like_media
from meteor.data.records import NameImage, UnreadableRecord
from meteor.errors import DataError, StorageError
from meteor.formatting import shorten
from meteor.image.inside import cell_fragment, map_images
from meteor.image.parquet_cells import open_parquet, rows_within

_OTHER_KEYS = ("id", "type", "category")
_BATCH_BYTES = 16 << 20
_MAX_BATCH_ROWS = 4096
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class TextColumns:
    """Leaf columns of a file that are read for its records.

    Attributes:
        text: paths of the leaf columns that are read for every row.
        bytes_of: leaf column with the path of an image -> leaf column with its bytes, which is read only if it must be.
        holding: columns whose values may hold images.
        unread: column of a name that is not read, which looks like one of images or other media -> its leaf column of bytes.
    """

    text: tuple[str, ...]
    bytes_of: Mapping[str, str]
    holding: tuple[str, ...]
    unread: Mapping[str, str]


@dataclass(frozen=True)
class _GroupPlan:
    """Columns of a row group: those to read, and what is known of others.

    Attributes:
        read: leaf columns to read.
        outside: columns whose images all lie outside the file.
        unread: columns that hold media and are not read.
    """

    read: list[str]
    outside: set[str]
    unread: list[str]


def open_records(uri: str) -> pq.ParquetFile:
    """Open a Parquet file of samples.

    Raises:
        DataError: the file is no Parquet, is cut short, or has no column with a dialogue.
    """
    try:
        file = open_parquet(uri)
        names = file.schema_arrow.names
    except StorageError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{uri} is no Parquet file, or damaged ({_shown(error)}): copy or download it again") from error
    if not any(key in names for key in DIALOGUE_KEYS):
        raise DataError(
            f"{uri} has the columns {', '.join(names)}, and none of {', '.join(DIALOGUE_KEYS)}: {FORMS_ADVICE}"
        )
    return file


def text_columns(file: pq.ParquetFile) -> TextColumns:
    """Find the leaf columns to read; those of an image are its path, which tells whether there is an image."""
    schema = file.metadata.schema
    leaves = {column.path: column for column in (schema.column(i) for i in range(len(schema)))}
    text, bytes_of, holding, unread = [], {}, [], {}
    for path, leaf in leaves.items():
        top, (parent, _, name) = _top(path), path.rpartition(".")
        is_bytes = leaf.physical_type.endswith("BYTE_ARRAY") and leaf.logical_type.type == "NONE"
        is_known = top in (*DIALOGUE_KEYS, *IMAGE_KEYS, *_OTHER_KEYS)
        if not is_known and not looks_like_media(top):
            continue
        if not is_known and is_bytes:
            unread[top] = path
        elif is_bytes and name == "bytes" and f"{parent}.path" in leaves:
            bytes_of[f"{parent}.path"] = path
            holding.append(top)
        elif path not in bytes_of and (f"{parent}.bytes" not in leaves or name in ("path", "bytes")):
            text.append(path)
            if is_bytes or top in (*IMAGE_KEYS, "messages"):
                holding.append(top)
    return TextColumns(tuple(text), bytes_of, tuple(dict.fromkeys(holding)), unread)


def read_parquet_records(uri: str, name_image: NameImage) -> Iterator[Any]:
    """Read the rows of a Parquet file, a few at a time.

    Args:
        uri: local path or s3://.
        name_image: function from the fragment of an image's URI to the image's name.

    Yields:
        Dicts of the columns that records have, with names in the place of images; `UnreadableRecord` for a row that cannot be
        read.

    Raises:
        DataError: see `open_records`.
    """
    file = open_records(uri)
    columns = text_columns(file)
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        row = start
        try:
            plan = _plan_group(file, group, columns)
            rows = min(rows_within(file, group, set(plan.read), _BATCH_BYTES), _MAX_BATCH_ROWS)
            for batch in file.iter_batches(rows, row_groups=[group], columns=plan.read, use_threads=False):
                for record in _as_records(batch):
                    yield _with_names(record, row, columns.holding, plan, name_image)
                    row += 1
        except StorageError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            for _ in range(row, end):
                yield UnreadableRecord(f"row group {group} of {uri} is damaged ({_shown(error)})")
        start = end


def _plan_group(file: pq.ParquetFile, group: int, columns: TextColumns) -> _GroupPlan:
    metadata = file.metadata.row_group(group)
    chunks = {chunk.path_in_schema: chunk for chunk in map(metadata.column, range(metadata.num_columns))}
    inside, outside, mixed = set(), set(), set()
    for path, data in columns.bytes_of.items():
        num_with_bytes = _num_present(chunks[data])
        if num_with_bytes == 0:
            outside.add(_top(path))
        elif num_with_bytes is not None and num_with_bytes == _num_images(file, group, path):
            inside.add(_top(path))
        else:
            mixed.add(_top(path))
    # If some images of a column lie outside, only the bytes show which.
    mixed |= inside & outside
    needed = {data for path, data in columns.bytes_of.items() if _top(path) in mixed}
    unread = [column for column, data in columns.unread.items() if _num_present(chunks[data]) != 0]
    return _GroupPlan(sorted({*columns.text, *columns.bytes_of, *needed}), outside - mixed, unread)


def _top(path: str) -> str:
    return path.partition(".")[0]


def _num_present(chunk: pq.ColumnChunkMetaData) -> int | None:
    """Return the number of values in a chunk that are not null; None if the file does not tell."""
    statistics = chunk.statistics
    return None if statistics is None or not statistics.has_null_count else chunk.num_values - statistics.null_count


def _num_images(file: pq.ParquetFile, group: int, path: str) -> int:
    """Count the images in a row group by reading their paths alone."""
    return sum(
        _num_structs(batch.column(0))
        for batch in file.iter_batches(_MAX_BATCH_ROWS, row_groups=[group], columns=[path])
    )


def _num_structs(array: pa.Array) -> int:
    """Count the structs that are there at the end of nested lists and structs of one field each."""
    while not (pa.types.is_struct(array.type) and not pa.types.is_nested(array.type.field(0).type)):
        array = array.flatten()[0] if pa.types.is_struct(array.type) else array.flatten()
    return len(array) - array.null_count


def _as_records(batch: pa.RecordBatch) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except (ValueError, pa.ArrowException):
        # A text that is no UTF-8, or a date that Python lacks, must not cost the other rows.
        for row in range(len(batch)):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except (ValueError, pa.ArrowException) as error:
                yield UnreadableRecord(f"a value cannot be read ({_shown(error)})")


def _with_names(record: Any, row: int, holding: Sequence[str], plan: _GroupPlan, name_image: NameImage) -> Any:
    """Return a row with names in the place of images, and a sign for media of a name that is not read."""
    if not isinstance(record, dict):
        return record
    for column in holding:
        positions = count()

        def name(image: Any, column: str = column, positions: Iterator[int] = positions) -> Any:
            position = next(positions)
            if (
                isinstance(image, dict)
                and image.get("path")
                and (column in plan.outside or image.get("bytes", b"") is None)
            ):
                return image["path"]
            return name_image(cell_fragment(row, column, position))

        if column in record:
            record[column] = map_images(record[column], name, column)
    unread = [column for column in plan.unread if record.get(column, "") is not None]
    return record | dict.fromkeys(unread, "bytes")


def _shown(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), _LONGEST_SHOWN)
