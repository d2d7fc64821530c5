"""Helpers for hundreds of thousands of samples: processes that share the work, and a pause of Python's cycle collector."""

import gc
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each takes up to 0.8 GB while it tokenises LLaVA's mixture (benchmarks/planning.py).
_MAX_PROCESSES = 8
# The function of a worker process, made at its start.
_function: Callable[[Any], Any] | None = None


def map_in_processes(make: Callable[[], Callable[[Item], Result]], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function in as many processes as there are CPUs; results come in the order of the items.

    Starting the processes takes seconds, so that only long work gains by it. Only a few items are held at a time.

    Args:
        make: makes the function, once in each process; it and the items are sent to the processes as pickles.
        items: arguments of the function.
    """
    # Unlike the standard library's, these processes do not import the main module again, which may start work or have no file.
    from loky import ProcessPoolExecutor

    num_processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    # `map` of an executor would read all items at once.
    waiting: deque[Future[Result]] = deque()
    # As bytes, because a process imports what a pickle needs while it reads it, and the next one only starts afterwards.
    with ProcessPoolExecutor(num_processes, initializer=_start, initargs=(pickle.dumps(make),)) as pool:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start(make: bytes) -> None:
    global _function
    gc.disable()
    _function = pickle.loads(make)()


def _call(item: Any) -> Any:
    assert _function is not None, "the process has started"
    return _function(item)


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
