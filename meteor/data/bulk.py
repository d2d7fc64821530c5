"""Work on hundreds of thousands of samples: by threads in order, and without the collector that looks for cycles."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# More threads would wait for the interpreter's lock.
_MAX_THREADS = 4


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function by threads; results come in the order of the items, of which few are held at a time."""
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, "samples") as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def without_cycle_collector() -> Iterator[None]:
    """Pause Python's collector of cycles: samples form none, and looking for them doubles the time that they take to make."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
