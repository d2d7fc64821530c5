"""The ledger of a cache: one record for each finished data file, one for each batch of bad images; the truth."""

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
_NUM_READERS = 16


def record_of(file: str) -> str:
    """The name of a data file's ledger record."""
    return f"{FEATURES_PREFIX}{file.removeprefix(f'{DATA}/')}"


def ledger_names(cache_uri: str) -> list[str]:
    """The names of all ledger records, sorted."""
    return [info.uri.rpartition("/")[2] for info in storage.list_objects(storage.join(cache_uri, LEDGER))]


def read_record(cache_uri: str, name: str) -> pa.Table:
    """One ledger record: a table of `KEY_SCHEMA` or of `QUARANTINE_SCHEMA`, as its name says."""
    schema = KEY_SCHEMA if name.startswith(FEATURES_PREFIX) else QUARANTINE_SCHEMA
    return read_table(storage.join(cache_uri, LEDGER, name), schema, advice=REPAIR_ADVICE)


def read_records(cache_uri: str, names: Sequence[str]) -> dict[str, pa.Table | CorruptPayloadError]:
    """Ledger records by name, or how they are damaged. One that is gone is left out: `gc` removes records.

    Raises:
        CacheError: a newer release wrote one.
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
