"""Helpers for hundreds of thousands of samples: threads that keep the order, and a pause of Python's cycle collector."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# More threads would only wait for the interpreter's lock.
_MAX_THREADS = 4


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function in threads; results come in the order of the items, and only a few items are held at a time."""
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    # `ThreadPoolExecutor.map` would read all items at once.
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
    """Pause Python's cycle collector: samples form no cycles, and the search for them doubles the time to make samples."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
