"""A budget of bytes that threads share: each waits until the memory it is going to use is free."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """Memory that threads take in parts, in the order in which they asked.

    The order keeps small parts from overtaking a large one for ever. A part larger than the whole budget is given when
    nobody else holds any. A thread holds one part at most, so threads cannot wait for each other in a circle.

    Args:
        num_bytes: size of the budget in bytes.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._num_free = num_bytes
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._holders: set[int] = set()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait for ``num_bytes`` bytes, and hold them until the block ends."""
        part, thread = min(num_bytes, self.num_bytes), threading.get_ident()
        assert thread not in self._holders, "a thread that holds a part would wait for itself"
        self._take(part)
        self._holders.add(thread)
        try:
            yield
        finally:
            self._holders.remove(thread)
            with self._changed:
                self._num_free += part
                self._changed.notify_all()

    def _take(self, part: int) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._num_free >= part)
                self._num_free -= part
            finally:
                # A thread that is interrupted while it waits must not block those behind it.
                self._queue.remove(ticket)
                self._changed.notify_all()
