"""Reading ahead: threads read the next values in order and within a memory limit, while the caller works."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

# With a limit in bytes alone, tiny images or an endlessly repeated image would make an endless queue.
MAX_IMAGES_AHEAD = 1024

Value = TypeVar("Value")


def read_ahead(
    keys: Iterable[str],
    read: Callable[[str], Value],
    size_bytes: Callable[[str], int],
    *,
    num_threads: int,
    max_bytes: int,
) -> Generator[Value, None, None]:
    """Yield ``read(key)`` for each key in order, while threads read the following values.

    Args:
        keys: keys, which may repeat and be endless; the iterating thread takes only as many as are read ahead.
        read: function that the threads call; its error is raised when the key's turn comes, and ends the iterator.
        size_bytes: function that returns the size of a key's value before it is read.
        num_threads: values that are read at the same time.
        max_bytes: most bytes of all values that are waiting or being read; a larger value is read alone.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prefetch") as pool:
        window = _Window(pool, iter(keys), read, size_bytes, max_bytes)
        try:
            window.fill()
            while window.waiting:
                value = window.take()
                # Filled before the value is yielded, so that the threads read on while the caller works with it.
                window.fill()
                yield value
        finally:
            # If the caller stops early, leaving the pool waits only for reads that have begun.
            pool.shutdown(wait=False, cancel_futures=True)


class _Window(Generic[Value]):
    """The values that are read ahead, oldest first."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        keys: Iterator[str],
        read: Callable[[str], Value],
        size_bytes: Callable[[str], int],
        max_bytes: int,
    ) -> None:
        self._pool, self._read, self._size_bytes, self._max_bytes = pool, read, size_bytes, max_bytes
        self._keys = keys
        self._following = next(keys, None)
        self.waiting: deque[tuple[str, int]] = deque()
        self._num_bytes = 0
        self._places: Counter[str] = Counter()
        self._futures: dict[str, Future[Value]] = {}

    def fill(self) -> None:
        """Begin to read as many of the following keys as the limits allow, but at least one."""
        while self._following is not None and len(self.waiting) < MAX_IMAGES_AHEAD:
            key, size = self._following, self._size_bytes(self._following)
            if self.waiting and self._num_bytes + size > self._max_bytes:
                return
            # A key that is waiting already is not read again, but counts again, so that the limit always holds.
            if not self._places[key]:
                self._futures[key] = self._pool.submit(self._read, key)
            self._places[key] += 1
            self._num_bytes += size
            self.waiting.append((key, size))
            self._following = next(self._keys, None)

    def take(self) -> Value:
        """Wait for the oldest value and remove it from the window."""
        key, size = self.waiting.popleft()
        value = self._futures[key].result()
        self._num_bytes -= size
        self._places[key] -= 1
        if not self._places[key]:
            del self._places[key], self._futures[key]
        return value
