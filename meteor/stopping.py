"""Signals that stop a command: the first one unwinds the main thread, a later one ends the process at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and some schedulers send a signal to the process and to its group, so that it arrives twice.
_REPEATED_S = 1.0


class Stopped(KeyboardInterrupt):
    """Error of a command that was asked to stop; its text says how the work goes on.

    It is a `KeyboardInterrupt`, as Ray passes no other exception of a signal handler through its C++ code.
    """


class _Request:
    """The first signal since the start of `stoppable`."""

    is_awaited = False
    received: signal.Signals | None = None
    time_s = 0.0
    ignored: frozenset[signal.Signals] = frozenset()


def stop_signal() -> signal.Signals | None:
    """Return the signal that asked this command to stop; None if there was none."""
    return _Request.received


def raise_if_stopped() -> None:
    """Raise `Stopped` in a thread of a command that was asked to stop."""
    if _Request.received is not None:
        raise Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread while the block runs, so that it cleans up.

    A second signal, a second later or more, ends the process at once. Signals that are ignored stay ignored, as `nohup` wants.
    Outside the main thread, which alone receives signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _Request.is_awaited, _Request.received = True, None
    _Request.ignored = frozenset(number for number, handler in before.items() if handler is signal.SIG_IGN)
    _listen()
    try:
        yield
    finally:
        _Request.is_awaited, _Request.received = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keep_listening() -> Iterator[None]:
    """Keep the handlers of `stoppable` over a block of Ray, which sets handlers of its own that exit."""
    if not _Request.is_awaited:
        yield
        return
    try:
        yield
    except SystemExit as error:
        _Request.received = _Request.received or signal.SIGTERM
        raise Stopped from error
    finally:
        _listen()


def _listen() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in _Request.ignored else _on_signal)


def _on_signal(number: int, frame: object) -> None:
    now_s = time.monotonic()
    if _Request.received is None:
        _Request.received, _Request.time_s = signal.Signals(number), now_s
        raise Stopped
    if now_s - _Request.time_s > _REPEATED_S:
        os._exit(128 + number)
