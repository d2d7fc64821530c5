"""The ledger of a cache, from which versions are built: a record per finished data file and per batch of bad images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from meteor import storage
from meteor.cache.folder import DATA, LEDGER
from meteor.cache.quarantine import QUARANTINE_SCHEMA
from meteor.cache.table import read_table
from meteor.cache.writer import KEY_SCHEMA
from meteor.errors import CorruptPayloadError, NotFoundError

REPAIR_ADVICE = "run `meteor cache verify --repair`"
FEATURES_PREFIX, QUARANTINE_PREFIX = "features-", "quarantine-"
# Reading many small records on S3 is waiting for round trips, so many threads help.
_NUM_READERS = 16


def record_of(file: str) -> str:
    """Return the name of a data file's ledger record."""
    return f"{FEATURES_PREFIX}{file.removeprefix(f'{DATA}/')}"


def ledger_names(cache_uri: str) -> list[str]:
    """List the names of all ledger records, sorted."""
    return [info.uri.rpartition("/")[2] for info in storage.list_objects(storage.join(cache_uri, LEDGER))]


def read_record(cache_uri: str, name: str) -> pa.Table:
    """Read a ledger record, a table with `KEY_SCHEMA` or `QUARANTINE_SCHEMA` depending on its name."""
    schema = KEY_SCHEMA if name.startswith(FEATURES_PREFIX) else QUARANTINE_SCHEMA
    return read_table(storage.join(cache_uri, LEDGER, name), schema, advice=REPAIR_ADVICE)


def read_records(cache_uri: str, names: Sequence[str]) -> dict[str, pa.Table | CorruptPayloadError]:
    """Read ledger records by name; the value for a damaged record is its error.

    Records that are gone are left out, because `gc` removes records.

    Raises:
        CacheError: a newer release wrote a record.
        StorageError: the store does not answer.
    """

    def read(name: str) -> pa.Table | CorruptPayloadError | None:
        try:
            return read_record(cache_uri, name)
        except CorruptPayloadError as error:
            return error
        except NotFoundError:
            return None

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        contents = zip(names, pool.map(read, names), strict=True)
        return {name: content for name, content in contents if content is not None}
