"""Progress lines of long work: how much is done, how fast it goes, how long the rest will take."""

import logging
import time

from meteor.formatting import format_duration

_LOG = logging.getLogger(__name__)


class Pace:
    """Rate at which a count grows.

    The measurement begins with the count's first change: before it, processes start and models load. It begins again if the
    count falls, which it does when workers resume from a checkpoint.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._since: tuple[float, int] | None = None

    def per_s(self, done: int, now_s: float) -> float | None:
        """Note that the count is ``done`` at the time ``now_s``, and return the rate per second; None while not known."""
        if self._last is not None and (done < self._last or (self._since is None and done > self._last)):
            self._since = now_s, done
        self._last = done
        if self._since is None or done == self._since[1]:
            return None
        return (done - self._since[1]) / (now_s - self._since[0])


def progress_line(what: str, done: int, total: int | None, per_s: float | None) -> str:
    """Return a line such as ``pretrain: step 120 of 4,650, 1.4 per second, 53 min 56 s left``.

    Without a total or a rate, the line omits the parts that need it.
    """
    line = f"{what} {done:,}" if total is None else f"{what} {done:,} of {total:,}"
    if per_s is None:
        return line
    digits = 0 if per_s >= 100 else 1
    rate = f"{per_s:,.{digits}f} per second" if per_s >= 1 else f"{format_duration(1 / per_s)} each"
    return f"{line}, {rate}" if total is None else f"{line}, {rate}, {format_duration((total - done) / per_s)} left"


class ProgressLog:
    """Callback of (done, total) that logs a progress line every few seconds.

    Args:
        what: beginning of the line, before the count, for example "finetune: tokenising: samples".
        every_s: seconds between two lines.
    """

    def __init__(self, what: str, *, every_s: float = 5.0) -> None:
        self._what = what
        self._every_s = every_s
        self._pace = Pace()
        self._pace.per_s(0, time.monotonic())
        self._next_s = time.monotonic() + every_s

    def __call__(self, done: int, total: int | None) -> None:
        now_s = time.monotonic()
        per_s = self._pace.per_s(done, now_s)
        if now_s >= self._next_s:
            _LOG.info("%s", progress_line(self._what, done, total, per_s))
            self._next_s = now_s + self._every_s
