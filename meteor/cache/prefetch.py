"""Reading ahead: what comes next is read by threads, in order and within a memory limit, while the caller works."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

# A limit in bytes alone would let tiny images, or one that is repeated for ever, make an endless queue.
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
    """``read(key)`` for each key, in the order of the keys, with the coming ones read by threads in the meantime.

    Args:
        keys: may repeat, may be endless; pulled in the thread that iterates, no further than is read ahead.
        read: called in the threads; its error comes out at the key's place and ends the iterator.
        size_bytes: of a key's value, known before it is read.
        num_threads: values read at the same time.
        max_bytes: values that are read or being read and not yet handed out take no more than this together; one value
            that is larger by itself is read alone.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prefetch") as pool:
        window = _Window(pool, iter(keys), read, size_bytes, max_bytes)
        try:
            window.fill()
            while window.waiting:
                value = window.take()
                # Before the value goes out: the threads read on while the caller works with it.
                window.fill()
                yield value
        finally:
            # Also where the caller stops early: leaving the pool waits only for what has begun.
            pool.shutdown(wait=False, cancel_futures=True)


class _Window(Generic[Value]):
    """The values that are waiting to be handed out, oldest first."""

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
        """Begin to read as many of the following keys as the limit allows, and one at least."""
        while self._following is not None and len(self.waiting) < MAX_IMAGES_AHEAD:
            key, size = self._following, self._size_bytes(self._following)
            if self.waiting and self._num_bytes + size > self._max_bytes:
                return
            # A key that is waiting already is read once; it counts again, so that the limit holds in any case.
            if not self._places[key]:
                self._futures[key] = self._pool.submit(self._read, key)
            self._places[key] += 1
            self._num_bytes += size
            self.waiting.append((key, size))
            self._following = next(self._keys, None)

    def take(self) -> Value:
        """The oldest value, once it is there."""
        key, size = self.waiting.popleft()
        value = self._futures[key].result()
        self._num_bytes -= size
        self._places[key] -= 1
        if not self._places[key]:
            del self._places[key], self._futures[key]
        return value
