"""Outages of the tracking store: whatever a server, a database or its driver raises, as one error with one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from meteor.errors import TrackingError
from meteor.secrets import redact
from meteor.tracking.names import public_uri

# Part of an error's text -> what to do.
_CURES = {
    "is locked": "another process holds the database: end it, or wait for it",
    "not a database": "the file is damaged: move it away, and a new one is made",
    "can't decode byte": "the file is damaged: move it away, and a new one is made",
    "malformed": "the file is damaged: move it away, and a new one is made",
    "is full": "free space on the disk",
    "No space left": "free space on the disk",
    "unable to open": "its folder must exist, and this user must be allowed to write there",
    "readonly": "this user must be allowed to write the file and its folder",
    "Read-only": "its folder must be writable, or tracking.uri must name another place",
    "Not a directory": "a file stands where its folder should be",
    "Permission denied": "this user must be allowed to write the file and its folder",
    "Can't locate revision": "a newer MLflow wrote the database: install that version, or name another file in tracking.uri",
    "No module named": "install the driver of the database, or name another driver, for example postgresql+psycopg2://",
    "Can't load plugin": "the driver's name is unknown: for example postgresql+psycopg2:// exists",
    "nsupported URI": "tracking.uri starts with http://, https://, sqlite:/// or postgresql://",
    "Could not parse": "tracking.uri starts with http://, https://, sqlite:/// or postgresql://",
}


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn every error of a block that talks to the tracking store into a `TrackingError`.

    A store is a stack of MLflow, SQLAlchemy, Alembic, drivers and HTTP, each with errors of its own. None of them is a reason
    to end a training.

    Args:
        uri: URI of the store, for the message.
    """
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {public_uri(uri)} refused or cannot be reached: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """Return one line about an error, without passwords, and with the cure if it is known."""
    # Later lines of SQLAlchemy's errors are the statement and a link.
    line = redact(str(error)).strip().partition("\n")[0] or type(error).__name__
    cure = next((cure for part, cure in _CURES.items() if part in line), None)
    return line if cure is None else f"{line} ({cure})"
