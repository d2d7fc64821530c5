"""Schedule of tasks that wait for each other; a failed task stops only the tasks that need it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Outcome of a task.

    Attributes:
        result: value that the task returned.
        error: exception of the task, or of the failed task that it needed.
        tried: whether the task was started.
    """

    result: Any = None
    error: BaseException | None = None
    tried: bool = True


def run_tasks(
    needs: Mapping[str, Sequence[str]], run: Callable[[str], Any], *, parallel: int, interrupt: Callable[[], None]
) -> dict[str, Outcome]:
    """Run every task after the tasks that it needs.

    If several tasks could start, the first in the order of ``needs`` starts, so that a chain ends before the next begins. An
    interrupt, for example of the keyboard, is raised after the running tasks have ended.

    Args:
        needs: task -> tasks that must be done before it, without circles.
        run: function that does one task; it is called in a thread.
        parallel: largest number of tasks at the same time.
        interrupt: function that lets the running tasks end soon; it is called after an interrupt.

    Returns:
        Task -> outcome, in the order of ``needs``.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[Future[Any], str] = {}
    waiting = list(needs)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="task")
    try:
        while waiting or running:
            for task in list(waiting):
                before = [outcomes.get(need) for need in needs[task]]
                failed = next((outcome for outcome in before if outcome and outcome.error), None)
                if failed:
                    outcomes[task] = Outcome(error=failed.error, tried=False)
                    waiting.remove(task)
                elif all(before) and len(running) < parallel:
                    running[pool.submit(run, task)] = task
                    waiting.remove(task)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcomes[running.pop(future)] = _outcome(future)
    except KeyboardInterrupt:
        interrupt()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {task: outcomes[task] for task in needs}


def _outcome(future: Future[Any]) -> Outcome:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return Outcome(error=error) if error is not None else Outcome(future.result())
