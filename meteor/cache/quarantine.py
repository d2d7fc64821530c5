"""Images that could not be encoded: kept with a reason, merged like finished files, gone once they are encoded."""

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
            # Null in tables of schema version 1.
            pa.field("uri", pa.string()),
            pa.field("size_bytes", pa.int64()),
        ]
    ),
    CACHE_SCHEMA_VERSION,
)

# These speak of where the image lay or of the limits in force, not of the bytes behind its key.
_RETRYABLE_REASONS = frozenset({"missing", "changed", "aspect_ratio", "too_many_pixels"})


@dataclass(frozen=True)
class QuarantineRow:
    """One image.

    Attributes:
        image_key: sha256 of its bytes, empty if they could not be read.
        name: its path as samples name it.
        reason: short stable code, see `BadImageError`.
        message: the whole sentence.
        uri: where it was read, empty if unknown.
        size_bytes: of the file, 0 if unknown.
    """

    image_key: str
    name: str
    reason: str
    message: str
    uri: str = ""
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """What identifies the image: its image key, or its name where the bytes could not be read."""
        return self.image_key or self.name


def retryable(row: QuarantineRow) -> bool:
    """Whether a build that wants the image must try again: its reason says nothing about the image's bytes.

    An image that is bad by its bytes would fail again; with other bytes it has another image key.
    """
    return row.reason in _RETRYABLE_REASONS


def record_quarantine(cache_uri: str, rows: Iterable[QuarantineRow]) -> None:
    """Publish bad images for the next commit; nothing happens when there are none."""
    if listed := list(rows):
        uri = storage.join(cache_uri, LEDGER, f"quarantine-{uuid.uuid4().hex}.parquet")
        storage.write_bytes(uri, table_bytes(quarantine_table(listed)))


def quarantine_table(rows: Iterable[QuarantineRow]) -> pa.Table:
    """The rows as a table of `QUARANTINE_SCHEMA`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=QUARANTINE_SCHEMA)


def quarantine_rows(table: pa.Table) -> list[QuarantineRow]:
    """The inverse of `quarantine_table`."""
    return [
        QuarantineRow(**{**fields, "uri": fields["uri"] or "", "size_bytes": fields["size_bytes"] or 0})
        for fields in table.to_pylist()
    ]


def merge_quarantine(held: pa.Table, pending: Sequence[pa.Table], encoded: pa.ChunkedArray) -> pa.Table:
    """Later rows replace earlier ones of the same image; what has been encoded meanwhile leaves. Sorted by key."""
    rows = pa.concat_tables([held, *pending])
    if not rows.num_rows:
        return rows
    order, starts = sorted_groups(_keys(rows))
    last = order[np.append(starts[1:], len(order)) - 1]
    latest = rows.take(last)
    return latest.filter(pc.invert(pc.is_in(_keys(latest), value_set=encoded)))


def _keys(rows: pa.Table) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(rows["image_key"], ""), rows["name"], rows["image_key"])
