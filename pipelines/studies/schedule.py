"""Tasks that wait for one another: as many at the same time as there is room for; one that fails stops only what needs it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a result, or an error; one that was not tried has the error of what it needed."""

    result: Any = None
    error: BaseException | None = None
    tried: bool = True


def run_tasks(needs: Mapping[str, Sequence[str]], run: Callable[[str], Any], *, parallel: int) -> dict[str, Outcome]:
    """Run every task after those that it needs.

    Of the tasks that could start the first in the mapping's order does, so that a chain ends before the next begins.

    Args:
        needs: task -> the tasks that must be done before it, in the order wanted; no circles.
        run: does one task, in a thread.
        parallel: most at the same time.

    Returns:
        Of every task, in the mapping's order. An interrupt, of the keyboard for example, is raised at once; tasks that run
        then are left to themselves.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[Future[Any], str] = {}
    waiting = list(needs)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="task")
    try:
        while waiting or running:
            for task in list(waiting):
                before = [outcomes.get(need) for need in needs[task]]
                failed = next((one for one in before if one and one.error), None)
                if failed:
                    outcomes[task] = Outcome(error=failed.error, tried=False)
                    waiting.remove(task)
                elif all(before) and len(running) < parallel:
                    running[pool.submit(run, task)] = task
                    waiting.remove(task)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcomes[running.pop(future)] = _outcome(future)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return {task: outcomes[task] for task in needs}


def _outcome(future: Future[Any]) -> Outcome:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return Outcome(error=error) if error is not None else Outcome(future.result())
