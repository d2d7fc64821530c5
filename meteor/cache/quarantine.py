"""Pictures that could not be encoded: kept with a reason, merged like finished files, gone once they are encoded."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from meteor import storage
from meteor.cache.folder import LEDGER
from meteor.cache.table import table_bytes, versioned
from meteor.constants import CACHE_SCHEMA_VERSION

QUARANTINE_SCHEMA = versioned(
    pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("image_key", "name", "reason", "message")]),
    CACHE_SCHEMA_VERSION,
)


@dataclass(frozen=True)
class QuarantineRow:
    """One picture.

    Attributes:
        image_key: sha256 of its bytes, empty if they could not be read.
        name: its path as samples name it.
        reason: short stable code, see `BadImageError`.
        message: the whole sentence.
    """

    image_key: str
    name: str
    reason: str
    message: str

    @property
    def key(self) -> str:
        """What identifies the picture: its image key, or its name where the bytes could not be read."""
        return self.image_key or self.name


def record_quarantine(cache_uri: str, rows: Iterable[QuarantineRow]) -> None:
    """Publish bad pictures for the next commit; nothing happens when there are none."""
    if listed := list(rows):
        uri = storage.join(cache_uri, LEDGER, f"quarantine-{uuid.uuid4().hex}.parquet")
        storage.write_bytes(uri, table_bytes(quarantine_table(listed)))


def quarantine_table(rows: Iterable[QuarantineRow]) -> pa.Table:
    """The rows as a table of `QUARANTINE_SCHEMA`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=QUARANTINE_SCHEMA)


def quarantine_rows(table: pa.Table) -> list[QuarantineRow]:
    """The inverse of `quarantine_table`."""
    return [QuarantineRow(**fields) for fields in table.to_pylist()]


def merge_quarantine(held: pa.Table, pending: Sequence[pa.Table], encoded: Iterable[str]) -> pa.Table:
    """Later rows replace earlier ones of the same picture; what has been encoded meanwhile leaves."""
    merged = {row.key: row for table in [held, *pending] for row in quarantine_rows(table)}
    for image_key in encoded:
        merged.pop(image_key, None)
    return quarantine_table(merged[key] for key in sorted(merged))
