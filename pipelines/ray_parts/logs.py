"""Log lines: text, or with ``METEOR_LOG_FORMAT=json`` objects that name the run, stage, rank and step of each line."""

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

from meteor.secrets import redact

# Fields of this thread's lines; a thread that a block starts gets them by `contextvars.copy_context`.
_ABOUT: ContextVar[dict[str, Any]] = ContextVar("fields of log lines")
# Fields of all lines of this process, for processes that do one thing, such as a training worker.
_PROCESS: dict[str, Any] = {}
_OURS = ("meteor", "pipelines", "jobs", "__main__")  # a stage's module is "__main__" if it is the command


class JsonFormatter(logging.Formatter):
    """Formatter that writes a record as one line of JSON.

    A line has ``time`` (UTC), ``level``, ``logger``, ``message`` and ``host``. It also has ``run`` (its name), ``stage``,
    ``digest`` (of the stage), ``rank``, ``step`` and ``error`` (a traceback), if they are known.
    """

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
        return redact(json.dumps(content, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """Formatter that writes time and message, with passwords and keys covered."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging() -> None:
    """Configure the process of a command: lines of this project from INFO, lines of other packages from WARNING."""
    _configure_lines(logging.INFO)
    # Ray Data warns that a job "will hang" whenever all CPUs are busy for a moment.
    for name in ("ray.data", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # This project's progress lines are the same with and without a terminal, and replace bars.
    ray.data.DataContext.get_current().enable_progress_bars = False
    transformers_logging.disable_progress_bar()


def configure_worker_logging(**about: Any) -> None:
    """Configure a worker or actor: lines from WARNING, with the same fields in all lines.

    Lines at INFO come from the driver, once instead of once per worker.

    Args:
        about: fields of the lines: ``run``, ``stage``, ``digest``, ``rank``.
    """
    _configure_lines(logging.WARNING)
    # Ray Train would repeat the numbers of every step.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    lines_are_about(**about)


def _configure_lines(level: int) -> None:
    handler = logging.StreamHandler()
    if os.environ.get("METEOR_LOG_FORMAT", "text") == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    # Ray's workers come with a handler that prints every line of every library.
    root.handlers = [other for other in root.handlers if type(other) is not logging.StreamHandler] + [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


def lines_are_about(**about: Any) -> None:
    """Add fields to all later lines of this process, for example ``step``."""
    _PROCESS.update(about)


@contextmanager
def log_context(**about: Any) -> Iterator[None]:
    """Add fields to the lines of a block."""
    token = _ABOUT.set({**_ABOUT.get({}), **about})
    try:
        yield
    finally:
        _ABOUT.reset(token)
