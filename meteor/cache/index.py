"""The dataset index: key, size and status of every image file, so that later stages need not open the images."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.table import (
    RowReader,
    latest_version,
    publish_next,
    read_table,
    table_bytes,
    version_name,
    versioned,
)
from meteor.constants import INDEX_SCHEMA_VERSION
from meteor.errors import CacheError

_SUFFIX = ".parquet"
# Characters that JSON escapes, and those beyond ASCII.
_ESCAPED_IN_JSON = r"[^ !#-\[\]-~]"
_NUM_SHOWN = 5
_ROWS_PER_PIECE = 65_536
_CONTENT = ("image_key", "width", "height", "status")
_AMBIGUOUS = -1
_ADVICE = "delete it: the version before it then counts, and cache_features reads the images that this version lacks"


@dataclass(frozen=True)
class IndexRow:
    """An image file in the index.

    Attributes:
        name: path of the image as samples write it.
        uri: URI from which the file was read.
        size_bytes, etag: state of the file when it was read (`storage.ObjectInfo`).
        image_key: sha256 of the file's bytes; empty if they could not be read.
        width, height: size in pixels as a viewer shows the image; 0 if unknown.
        status: "ok" if features can be computed, else "bad".
        reason: reason of a bad image (see `BadImageError`), else "".
    """

    name: str
    uri: str
    size_bytes: int
    etag: str
    image_key: str
    width: int
    height: int
    status: Literal["ok", "bad"]
    reason: str = ""


_ARROW_TYPES = {"size_bytes": pa.int64(), "width": pa.int32(), "height": pa.int32()}
INDEX_SCHEMA = versioned(
    pa.schema(
        [pa.field(field.name, _ARROW_TYPES.get(field.name, pa.string()), nullable=False) for field in fields(IndexRow)]
    ),
    INDEX_SCHEMA_VERSION,
)


class DatasetIndex:
    """A published version of the index, a table with `INDEX_SCHEMA` sorted by URI and name.

    A file with several names in samples has a row for each name.
    """

    def __init__(self, uri: str, version: int, table: pa.Table) -> None:
        self.uri = uri
        self.version = version
        self.table = table

    @classmethod
    def open(cls, uri: str, version: int) -> "DatasetIndex":
        """Open a published version below the index's URI. Raises NotFoundError if it does not exist."""
        table = read_table(storage.join(uri, f"{version_name(version)}{_SUFFIX}"), INDEX_SCHEMA, advice=_ADVICE)
        return cls(storage.absolute(uri), version, table)

    @staticmethod
    def latest_version(uri: str) -> int:
        """Return the number of the latest version, 0 before the first."""
        return latest_version(uri, _SUFFIX)

    @classmethod
    def latest(cls, uri: str) -> "DatasetIndex | None":
        """Open the latest version; return None before the first."""
        version = cls.latest_version(uri)
        return cls.open(uri, version) if version else None

    @classmethod
    def publish(cls, uri: str, rows: Iterable[IndexRow]) -> "DatasetIndex":
        """Merge rows into the latest version by URI and name, and publish the result.

        Rows for other names of a file stay, unless the file has changed since they were read.

        Returns:
            The new version, or the latest version if the rows change nothing.
        """
        # If two rows have an equal URI and name, the last counts.
        by_place = {(row.uri, row.name): row for row in rows}
        columns = {name: [getattr(row, name) for row in by_place.values()] for name in INDEX_SCHEMA.names}
        new = pa.table(columns, schema=INDEX_SCHEMA)

        def content_after(latest: int) -> bytes | None:
            held = cls.open(uri, latest).table if latest else INDEX_SCHEMA.empty_table()
            merged = _merge(held, new)
            return None if latest and merged.equals(held) else table_bytes(merged)

        return cls.open(uri, publish_next(uri, _SUFFIX, content_after))

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self) -> list[IndexRow]:
        """Return all rows, sorted by URI and name."""
        columns = [self.table[field.name].to_pylist() for field in fields(IndexRow)]
        return [IndexRow(*values) for values in zip(*columns, strict=True)]

    def lookup(self, uri_or_name: str) -> IndexRow | None:
        """Find the row of an image by its URI, or else by its name in samples; return None if it is not indexed.

        Raises:
            CacheError: several URIs with different contents have this name.
        """
        position = self._by_uri.get(uri_or_name, self._by_name.get(uri_or_name))
        if position == _AMBIGUOUS:
            raise CacheError(
                f"the index {self.uri} holds several images named {uri_or_name!r} with different contents; "
                "name it by URI, or keep an index for each image root"
            )
        return None if position is None else IndexRow(**self._rows.row(position))

    def unchanged(self, info: storage.ObjectInfo) -> IndexRow | None:
        """Return the row of an unchanged file (equal URI, size and etag), or None if the file must be read again."""
        position = self._by_uri.get(info.uri)
        row = None if position is None else IndexRow(**self._rows.row(position))
        return row if row and (row.size_bytes, row.etag) == (info.size_bytes, info.etag) else None

    def digest(self, uris_or_names: Iterable[str] | pa.StringArray) -> str:
        """Compute a fingerprint of these images as a data set, from names, contents, sizes and statuses.

        It does not depend on the order of the names, repeats, the location of the files or modification times.

        Returns:
            sha256, 64 hexadecimal digits.

        Raises:
            CacheError: an image is not indexed.
        """
        wanted = uris_or_names if isinstance(uris_or_names, pa.Array) else pa.array(list(uris_or_names), pa.string())
        by_uri = _find_last(wanted, self.table["uri"])
        named = wanted.filter(by_uri.is_null())
        odd = named.filter(pc.is_in(named, value_set=self._ambiguous))
        if len(odd):
            # This raises the error for an ambiguous name.
            self.lookup(odd[0].as_py())
        places = pc.coalesce(by_uri, pc.index_in(wanted, value_set=self.table["name"]))
        if places.null_count:
            missing = sorted(set(wanted.filter(places.is_null()).to_pylist()))
            raise CacheError(
                f"{len(missing)} images are not in version {self.version} of the index {self.uri}, for example "
                f"{missing[:_NUM_SHOWN]}; run cache_features over the data set"
            )
        contents = self.table.select(["name", *_CONTENT]).take(pc.unique(places))
        # Names found as names are distinct; a row found by its URI may have the name of another one.
        if len(named) == len(wanted) or pc.count_distinct(contents["name"]).as_py() == len(contents):
            return _json_digest(contents.sort_by("name"))
        # Two URIs of one name were asked for: rows of equal content count once.
        distinct = contents.group_by(contents.column_names).aggregate([])
        return _json_digest(distinct.sort_by([(name, "ascending") for name in distinct.column_names]))

    def rows_named(self, names: pa.StringArray) -> pa.Table:
        """Return the rows with these names; unknown names are left out, and the last of several equal names counts."""
        return self.table.take(pc.drop_null(pc.unique(_find_last(names, self.table["name"]))))

    @cached_property
    def _ambiguous(self) -> pa.ChunkedArray:
        """Names that several rows with different contents share."""
        firsts = pc.index_in(self.table["name"], value_set=self.table["name"]).to_numpy()
        repeats = np.flatnonzero(firsts != np.arange(len(firsts)))
        contents, first_contents = (
            self.table.select(_CONTENT).take(pa.array(rows)) for rows in (repeats, firsts[repeats])
        )
        differs = [
            pc.not_equal(column, first_column)
            for column, first_column in zip(contents.columns, first_contents.columns, strict=True)
        ]
        return self.table["name"].take(pa.array(repeats)).filter(reduce(pc.or_, differs))

    @cached_property
    def _rows(self) -> RowReader:
        return RowReader(self.table, repeated="reason")

    @cached_property
    def _by_uri(self) -> dict[str, int]:
        return {uri: position for position, uri in enumerate(self.table["uri"].to_pylist())}

    @cached_property
    def _by_name(self) -> dict[str, int]:
        by_name: dict[str, int] = {}
        contents = list(zip(*(self.table[name].to_pylist() for name in _CONTENT), strict=True))
        for position, name in enumerate(self.table["name"].to_pylist()):
            first = by_name.setdefault(name, position)
            if first == _AMBIGUOUS or contents[first] != contents[position]:
                by_name[name] = _AMBIGUOUS
        return by_name


def _find_last(values: pa.Array, column: pa.ChunkedArray) -> pa.Array:
    """Return the last row of the column with each value, or null if no row has it."""
    # `index_in` finds the first row, so it searches the reversed column.
    reverse = column.take(pa.array(np.arange(len(column) - 1, -1, -1)))
    return pc.subtract(pa.scalar(len(column) - 1, pa.int32()), pc.index_in(values, value_set=reverse))


def _json_digest(table: pa.Table) -> str:
    """Return the sha256 of the rows as a JSON list of lists, encoded piece by piece to save memory."""
    digest = hashlib.sha256(b"[")
    separator = b""
    for batch in table.combine_chunks().to_batches(_ROWS_PER_PIECE):
        digest.update(separator + _json_rows(batch))
        separator = b","
    digest.update(b"]")
    return digest.hexdigest()


def _json_rows(rows: pa.RecordBatch) -> bytes:
    """Return the rows as the inside of a JSON list; texts that JSON writes as they are take a tenth of the time."""
    texts = [column for column in rows.columns if pa.types.is_string(column.type)]
    if any(pc.any(pc.match_substring_regex(column, _ESCAPED_IN_JSON)).as_py() for column in texts):
        values = list(zip(*(column.to_pylist() for column in rows.columns), strict=True))
        return json.dumps(values, separators=(",", ":"), ensure_ascii=True)[1:-1].encode()
    columns = [
        pc.binary_join_element_wise('"', column, '"', "")
        if pa.types.is_string(column.type)
        else pc.cast(column, pa.string())
        for column in rows.columns
    ]
    lines = pc.binary_join_element_wise("[", pc.binary_join_element_wise(*columns, ","), "]", "")
    return pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), ",")[0].as_py().encode()


def _merge(held: pa.Table, new: pa.Table) -> pa.Table:
    def known(*columns: str) -> pa.ChunkedArray:
        keys = [
            pc.binary_join_element_wise(*(pc.cast(t[name], pa.string()) for name in columns), "\0") for t in (held, new)
        ]
        return pc.is_in(keys[0], value_set=keys[1])

    # A held row goes if a new row has its URI and name, or if a new row shows that its file has changed.
    replaced = pc.or_(known("uri", "name"), pc.and_not(known("uri"), known("uri", "size_bytes", "etag")))
    kept = held.filter(pc.invert(replaced))
    return pa.concat_tables([kept, new]).sort_by([("uri", "ascending"), ("name", "ascending")])
