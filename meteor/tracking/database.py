"""Databases of MLflow: complete before MLflow opens them, whoever is killed or starts at the same time.

MLflow creates a database in place by dozens of migrations, which cannot be repeated from the middle and do not exclude each
other. Here they run on a file beside the database, under a lock, and the finished file gets the database's name.
"""

import fcntl
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from meteor.errors import TrackingError

_LOG = logging.getLogger(__name__)
# Migrations of a new database take a second or two on two cores.
_LOCK_WAIT_S, _LOCK_PAUSE_S = 60.0, 0.1
# Time for another process to finish writing.
_BUSY_S = 5.0
_ENGINES = ("sqlite", "postgresql", "mysql", "mssql")


@contextmanager
def ready_database(uri: str) -> Iterator[None]:
    """Make sure that a database can be opened, and keep other starts out while the block opens it.

    A SQLite file that is absent or incomplete is made anew, and one that an older MLflow wrote is migrated; a copy of the old
    file stays beside it. Other databases are tried once, as MLflow alone would try for minutes. Servers are left to the block.

    Args:
        uri: URI of the tracking store.

    Raises:
        TrackingError: the database is in use, or was not made by MLflow.
    """
    if uri.partition("://")[0].partition("+")[0] not in _ENGINES:
        yield
        return
    file = _sqlite_file(uri)
    if file is None:
        _try_connection(uri)
        yield
        return
    with _locked(file):
        _prepare(file)
        yield


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for other databases and for databases in memory."""
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    in_memory = not url.database or ":memory:" in url.database or url.database.startswith("file:")
    return None if url.get_backend_name() != "sqlite" or in_memory else Path(str(url.database)).absolute()


def _try_connection(uri: str) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a database. The kernel releases it if the process is killed; on NFS it holds across machines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The file of the lock stays: if it were deleted, a waiting process would hold the lock of a file without a name.
    with open(f"{file}.lock", "ab") as lock:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"another process has prepared the MLflow database {file} for more than {_LOCK_WAIT_S:.0f} s: end "
                        "that process if it hangs"
                    ) from error
                time.sleep(_LOCK_PAUSE_S)
        yield


def _prepare(file: Path) -> None:
    """Bring a SQLite file to the form that the installed MLflow needs, at once or not at all."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    revision, has_content = _read_state(file)
    if revision == _get_latest_schema_revision():
        return
    new = file.with_name(f"{file.name}.new")
    try:
        _remove(new)  # left by a process that was killed
        if has_content:
            with closing(_open(file)) as old, closing(sqlite3.connect(new)) as copy:
                old.backup(copy)
        _migrate(new, is_new=not has_content)
        if file.exists() and file.stat().st_size:
            kept = shutil.copy2(file, f"{file}.{time.time_ns()}.bak")
            what = (
                "was of an older MLflow and is migrated" if has_content else "had never been completed and is made anew"
            )
            _LOG.warning("MLflow's database %s %s; the file as it was is %s", file, what, kept)
        os.replace(new, file)
        _sync(file.parent)
    finally:
        _remove(new)


def _read_state(file: Path) -> tuple[str | None, bool]:
    """Return a SQLite file's revision of MLflow's schema, None before its first migration, and whether it has content.

    MLflow writes the default experiment after the last migration. A file without experiments was never completed.
    """
    if file.is_dir():
        raise TrackingError(f"{file} must be MLflow's database, and is a folder: move it away, or set tracking.uri")
    if not file.exists():
        return None, False
    with closing(_open(file)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not tables & {"experiments", "alembic_version"}:
            raise TrackingError(
                f"{file} is a database of another program, with the table {min(tables)}: name another file in tracking.uri"
            )
        rows = database.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
        revision = next((row[0] for row in rows), None)
        found = database.execute("SELECT 1 FROM experiments LIMIT 1") if "experiments" in tables else ()
        return revision, any(True for _ in found)


def _open(file: Path) -> sqlite3.Connection:
    """Open an existing SQLite file. It may need a rollback after a kill, so that reading alone is not enough."""
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=_BUSY_S)


def _migrate(file: Path, *, is_new: bool) -> None:
    """Run MLflow's migrations on a file that no other process sees."""
    from mlflow.store.db.utils import _initialize_tables, _upgrade_db, create_sqlalchemy_engine
    from sqlalchemy import event

    engine = create_sqlalchemy_engine(f"sqlite:///{file}")

    @event.listens_for(engine, "connect")
    def without_sync(connection: sqlite3.Connection, record: object) -> None:
        # A file that a kill leaves is deleted, and one sync at the end is enough: hundreds take minutes on a network's disk.
        connection.execute("PRAGMA synchronous = OFF")

    try:
        (_initialize_tables if is_new else _upgrade_db)(engine)
    finally:
        engine.dispose()
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(file: Path) -> None:
    """Delete a SQLite file with its journal."""
    for name in (file, file.with_name(f"{file.name}-journal")):
        name.unlink(missing_ok=True)
