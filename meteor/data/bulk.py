"""Helpers for hundreds of thousands of samples.

Processes share the work, a batch that fails loses only the items at fault, and Python's cycle collector pauses.
"""

import gc
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from meteor.errors import DataError, MeteorError

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

    Raises:
        DataError: the system ended a process, most often for lack of memory.
    """
    # Unlike the standard library's, these processes do not import the main module again, which may start work or have no file.
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    num_processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    # `map` of an executor would read all items at once.
    waiting: deque[Future[Result]] = deque()
    # As bytes, because a process imports what a pickle needs while it reads it, and the next one only starts afterwards.
    with ProcessPoolExecutor(num_processes, initializer=_start, initargs=(pickle.dumps(make),)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"the system ended one of {num_processes} processes that work on the samples, most often for lack of memory: "
                "free some memory, or allow fewer CPUs with `taskset`, which starts fewer processes"
            ) from error


def by_halves(
    function: Callable[[Sequence[Item]], Result],
    batch: Sequence[Item],
    fail: Callable[[Sequence[Item], BaseException], Result],
    *,
    concerns_items: Callable[[BaseException], bool] = lambda error: not isinstance(error, MeteorError),
) -> Iterator[Result]:
    """Apply a function to a batch; if it fails, to its halves, so that only the items at fault are lost.

    Args:
        function: function of a batch.
        batch: list, or Arrow batch of rows, with at least one item.
        fail: makes the result of a batch of one item for which the function fails.
        concerns_items: whether an error may be due to single items. Other errors pass; by default those of
            `meteor.errors`, which are foreseen.
    """
    try:
        yield function(batch)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # A panic in the Rust code of a tokenizer is no Exception.
    except BaseException as error:
        if not concerns_items(error):
            raise
        size = len(batch)
        if size == 1:
            yield fail(batch, error)
            return
        for half in (batch[: size // 2], batch[size // 2 :]):
            yield from by_halves(function, half, fail, concerns_items=concerns_items)


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
