"""Log lines: for people; with ``METEOR_LOG_FORMAT=json`` objects that say which run, stage, rank and step they are about."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import ray.data
from transformers.utils import logging as transformers_logging

# What the lines of this thread are about; threads that a block starts take it along by `contextvars.copy_context`.
_ABOUT: ContextVar[dict[str, Any]] = ContextVar("what log lines are about")
# The same for every thread of a process that does one thing, as a training worker.
_PROCESS: dict[str, Any] = {}
_OURS = ("meteor", "pipelines", "jobs", "__main__")  # the last is a stage's module where it is the command


class JsonFormatter(logging.Formatter):
    """One line of JSON: ``time`` (UTC), ``level``, ``logger``, ``message``, ``host``, then what is known of ``variant``,
    ``stage``, ``run`` (the digest), ``rank``, ``step``, and ``error`` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "host": socket.gethostname(),
            **_PROCESS,
            **_ABOUT.get({}),
        }
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def configure_logging() -> None:
    """In the process of a command: our own lines at INFO, other packages' at WARNING."""
    _configure_lines(logging.INFO)
    # Ray Data warns that a job "will hang" whenever all CPUs are busy for a moment.
    for name in ("ray.data", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Our own lines tell of progress, in the same form with and without a terminal.
    ray.data.DataContext.get_current().enable_progress_bars = False
    transformers_logging.disable_progress_bar()


def configure_worker_logging(**about: Any) -> None:
    """In a worker or actor, whose lines are all about one thing: ``stage``, ``variant``, ``run``, ``rank``; at WARNING, as what
    every worker of a stage would say, its driver says once."""
    _configure_lines(logging.WARNING)
    # It would repeat every step's numbers.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    lines_are_about(**about)


def _configure_lines(level: int) -> None:
    handler = logging.StreamHandler()
    if os.environ.get("METEOR_LOG_FORMAT", "text") == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    # Ray's workers come with one of their own, which tells everything of every library.
    root.handlers = [one for one in root.handlers if type(one) is not logging.StreamHandler] + [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


def lines_are_about(**about: Any) -> None:
    """All later lines of this process are about this as well, for example ``step``."""
    _PROCESS.update(about)


@contextmanager
def log_context(**about: Any) -> Iterator[None]:
    """The lines of the block are about this as well."""
    token = _ABOUT.set({**_ABOUT.get({}), **about})
    try:
        yield
    finally:
        _ABOUT.reset(token)
