"""Images that could not be encoded: a table with reasons, which an image leaves as soon as it is encoded."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.folder import LEDGER
from meteor.cache.table import sorted_groups, table_bytes, versioned
from meteor.constants import CACHE_SCHEMA_VERSION

QUARANTINE_SCHEMA = versioned(
    pa.schema(
        [
            *(pa.field(name, pa.string(), nullable=False) for name in ("image_key", "name", "reason", "message")),
            # Both are null in tables of schema version 1.
            pa.field("uri", pa.string()),
            pa.field("size_bytes", pa.int64()),
        ]
    ),
    CACHE_SCHEMA_VERSION,
)

# These reasons come from the image's location or from limits in the settings, not from the image's bytes.
_RETRYABLE_REASONS = frozenset({"missing", "changed", "aspect_ratio", "too_many_pixels", "inaccessible", "failed"})


@dataclass(frozen=True)
class QuarantineRow:
    """An image that could not be encoded.

    Attributes:
        image_key: sha256 of the file's bytes; empty if they could not be read.
        name: path of the image as samples write it.
        reason: short stable code, see `BadImageError`.
        message: description of the problem.
        uri: URI from which the file was read; empty if unknown.
        size_bytes: size of the file; 0 if unknown.
    """

    image_key: str
    name: str
    reason: str
    message: str
    uri: str = ""
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """Identifier of the image: its image key, or its name if the bytes could not be read."""
        return self.image_key or self.name


def retryable(reason: str) -> bool:
    """Return whether an image with this reason must be tried again, because the reason says nothing about its bytes.

    An image with bad bytes would fail again; with other bytes it would have another image key.
    """
    return reason in _RETRYABLE_REASONS


def record_quarantine(cache_uri: str, rows: Iterable[QuarantineRow]) -> None:
    """Publish bad images for the next commit; do nothing if there are none."""
    if listed := list(rows):
        uri = storage.join(cache_uri, LEDGER, f"quarantine-{uuid.uuid4().hex}.parquet")
        storage.write_bytes(uri, table_bytes(quarantine_table(listed)))


def quarantine_table(rows: Iterable[QuarantineRow]) -> pa.Table:
    """Convert rows to a table with `QUARANTINE_SCHEMA`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=QUARANTINE_SCHEMA)


def quarantine_rows(table: pa.Table) -> list[QuarantineRow]:
    """Convert a table from `quarantine_table` back to rows."""
    return [
        QuarantineRow(**{**fields, "uri": fields["uri"] or "", "size_bytes": fields["size_bytes"] or 0})
        for fields in table.to_pylist()
    ]


def merge_quarantine(held: pa.Table, pending: Sequence[pa.Table], encoded: pa.ChunkedArray) -> pa.Table:
    """Merge quarantine rows: an image's last row counts, and encoded images are removed. The result is sorted by key."""
    rows = pa.concat_tables([held, *pending])
    if not rows.num_rows:
        return rows
    order, starts = sorted_groups(_keys(rows))
    last = order[np.append(starts[1:], len(order)) - 1]
    latest = rows.take(last)
    return latest.filter(pc.invert(pc.is_in(_keys(latest), value_set=encoded)))


def _keys(rows: pa.Table) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(rows["image_key"], ""), rows["name"], rows["image_key"])
