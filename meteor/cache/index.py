"""The dataset index: what every image file is (key, size, good or bad), so that nobody opens the images again."""

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
_NUM_SHOWN = 5
_ROWS_PER_PIECE = 65_536
_CONTENT = ("image_key", "width", "height", "status")
_AMBIGUOUS = -1
_ADVICE = "delete it: the version before it counts then, and cache_features reads what that lacks"


@dataclass(frozen=True)
class IndexRow:
    """One image file.

    Attributes:
        name: its path as samples name it.
        uri: where it was read.
        size_bytes, etag: of the file as it was read (`storage.ObjectInfo`).
        image_key: sha256 of its bytes; empty if they could not be read.
        width, height: pixels as a viewer shows the image; 0 if unknown.
        status: whether features can be made of it.
        reason: why not, empty when they can (see `BadImageError`).
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
    """One published version of the index, a table of `INDEX_SCHEMA` sorted by URI and name.

    A file that samples give several names has a row for each.
    """

    def __init__(self, uri: str, version: int, table: pa.Table) -> None:
        self.uri = uri
        self.version = version
        self.table = table

    @classmethod
    def open(cls, uri: str, version: int) -> "DatasetIndex":
        """A published version below the index's URI. Raises NotFoundError if there is none."""
        table = read_table(storage.join(uri, f"{version_name(version)}{_SUFFIX}"), INDEX_SCHEMA, advice=_ADVICE)
        return cls(storage.absolute(uri), version, table)

    @staticmethod
    def latest_version(uri: str) -> int:
        """Number of the latest version, 0 before the first."""
        return latest_version(uri, _SUFFIX)

    @classmethod
    def latest(cls, uri: str) -> "DatasetIndex | None":
        """The latest version, None before the first."""
        version = cls.latest_version(uri)
        return cls.open(uri, version) if version else None

    @classmethod
    def publish(cls, uri: str, rows: Iterable[IndexRow]) -> "DatasetIndex":
        """Merge rows over those of the latest version by URI and name, and publish the result.

        Other names of a file stay, unless the file is not as it was when they were read.

        Returns:
            The new version; the latest one when the rows change nothing.
        """
        # Of two rows for one URI and name the last counts.
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
        """All rows, by URI and name."""
        columns = [self.table[field.name].to_pylist() for field in fields(IndexRow)]
        return [IndexRow(*values) for values in zip(*columns, strict=True)]

    def lookup(self, uri_or_name: str) -> IndexRow | None:
        """The row of the image with this URI, else of the one that samples name so; None when it is not indexed.

        Raises:
            CacheError: several URIs have the name and differ in content.
        """
        position = self._by_uri.get(uri_or_name, self._by_name.get(uri_or_name))
        if position == _AMBIGUOUS:
            raise CacheError(
                f"the index {self.uri} holds several images named {uri_or_name!r} with different contents; "
                "ask by URI, or keep one index for each image root"
            )
        return None if position is None else IndexRow(**self._rows.row(position))

    def unchanged(self, info: storage.ObjectInfo) -> IndexRow | None:
        """The row of a file that is still as it was read (same URI, size, etag); None if it must be read again."""
        position = self._by_uri.get(info.uri)
        row = None if position is None else IndexRow(**self._rows.row(position))
        return row if row and (row.size_bytes, row.etag) == (info.size_bytes, info.etag) else None

    def digest(self, uris_or_names: Iterable[str] | pa.StringArray) -> str:
        """Fingerprint of these images as a data set: names, contents, sizes, and which are bad.

        The same for any order, repeated names, another place of the same files, and other modification times.

        Returns:
            sha256, 64 hexadecimal digits.

        Raises:
            CacheError: an image is not indexed.
        """
        asked = uris_or_names if isinstance(uris_or_names, pa.Array) else pa.array(list(uris_or_names), pa.string())
        asked = pc.unique(asked)
        by_uri = _find_last(asked, self.table["uri"])
        named = asked.filter(by_uri.is_null())
        odd = named.filter(pc.is_in(named, value_set=self._ambiguous))
        if len(odd):
            self.lookup(odd[0].as_py())  # raises
        places = pc.coalesce(by_uri, pc.index_in(asked, value_set=self.table["name"]))
        if places.null_count:
            missing = sorted(asked.filter(places.is_null()).to_pylist())
            raise CacheError(
                f"{len(missing)} images are not in version {self.version} of the index {self.uri}, for example "
                f"{missing[:_NUM_SHOWN]}; run cache_features over the data set"
            )
        contents = self.table.select(["name", *_CONTENT]).take(pc.unique(places))
        if pc.count_distinct(contents["name"]).as_py() == len(contents):
            return _json_digest(contents.sort_by("name"))
        # Two URIs of one name were asked for: rows of equal content count once.
        distinct = contents.group_by(contents.column_names).aggregate([])
        return _json_digest(distinct.sort_by([(name, "ascending") for name in distinct.column_names]))

    def rows_named(self, names: pa.StringArray) -> pa.Table:
        """The rows of the images with these names, without names that it does not hold; of several with one name the last."""
        return self.table.take(pc.drop_null(_find_last(pc.unique(names), self.table["name"])))

    @cached_property
    def _ambiguous(self) -> pa.ChunkedArray:
        """Names of several rows that differ in content."""
        contents = self.table.select(_CONTENT)
        first = contents.take(pc.index_in(self.table["name"], value_set=self.table["name"]))
        differs = [pc.not_equal(one, other) for one, other in zip(contents.columns, first.columns, strict=True)]
        return self.table["name"].filter(reduce(pc.or_, differs))

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
    """The last row of the column that holds each value; null where none does."""
    reverse = column.take(pa.array(np.arange(len(column) - 1, -1, -1)))
    return pc.subtract(pa.scalar(len(column) - 1, pa.int32()), pc.index_in(values, value_set=reverse))


def _json_digest(table: pa.Table) -> str:
    """sha256 of the rows as a JSON list of lists, a piece at a time."""
    digest = hashlib.sha256(b"[")
    separator = b""
    for batch in table.combine_chunks().to_batches(_ROWS_PER_PIECE):
        rows = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        digest.update(separator + json.dumps(rows, separators=(",", ":"), ensure_ascii=True)[1:-1].encode())
        separator = b","
    digest.update(b"]")
    return digest.hexdigest()


def _merge(held: pa.Table, new: pa.Table) -> pa.Table:
    def known(*columns: str) -> pa.ChunkedArray:
        keys = [
            pc.binary_join_element_wise(*(pc.cast(t[name], pa.string()) for name in columns), "\0") for t in (held, new)
        ]
        return pc.is_in(keys[0], value_set=keys[1])

    replaced = pc.or_(known("uri", "name"), pc.and_not(known("uri"), known("uri", "size_bytes", "etag")))
    kept = held.filter(pc.invert(replaced))
    return pa.concat_tables([kept, new]).sort_by([("uri", "ascending"), ("name", "ascending")])
