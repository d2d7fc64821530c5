"""The dataset index: what every image file is (key, size, good or bad), so that nobody opens the images again."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

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

    def digest(self, uris_or_names: Iterable[str]) -> str:
        """Fingerprint of these images as a data set: names, contents, sizes, and which are bad.

        The same for any order, repeated names, another place of the same files, and other modification times.

        Returns:
            sha256, 64 hexadecimal digits.

        Raises:
            CacheError: an image is not indexed.
        """
        asked = sorted(set(uris_or_names))
        found = [self.lookup(image) for image in asked]
        if missing := [image for image, row in zip(asked, found, strict=True) if row is None]:
            raise CacheError(
                f"{len(missing)} images are not in version {self.version} of the index {self.uri}, for example "
                f"{missing[:_NUM_SHOWN]}; run cache_features over the data set"
            )
        contents = sorted({(row.name, row.image_key, row.width, row.height, row.status) for row in found if row})
        canonical = json.dumps(contents, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

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


def _merge(held: pa.Table, new: pa.Table) -> pa.Table:
    def known(*columns: str) -> pa.ChunkedArray:
        keys = [
            pc.binary_join_element_wise(*(pc.cast(t[name], pa.string()) for name in columns), "\0") for t in (held, new)
        ]
        return pc.is_in(keys[0], value_set=keys[1])

    replaced = pc.or_(known("uri", "name"), pc.and_not(known("uri"), known("uri", "size_bytes", "etag")))
    kept = held.filter(pc.invert(replaced))
    return pa.concat_tables([kept, new]).sort_by([("uri", "ascending"), ("name", "ascending")])
