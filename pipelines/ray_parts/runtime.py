"""All Ray wiring that is not one stage's own: the session, the workers' environment, progress of long work."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

import ray

from meteor.config.settings import RuntimeSettings
from meteor.progress import Pace, progress_line

_LOG = logging.getLogger(__name__)

# Set before the packages that read them are imported, in the driver and in every worker.
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_TRAIN_V2_ENABLED": "1",
}


def worker_environment(num_gpus: float) -> dict[str, str]:
    """Environment of workers; without a GPU, DeepSpeed must be told before it is imported."""
    return WORKER_ENVIRONMENT if num_gpus else {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cpu"}


_session = {"local": False}


def session_is_local() -> bool:
    """Whether this process started its own Ray, on this machine alone."""
    return _session["local"]


@contextmanager
def ray_session(settings: RuntimeSettings) -> Iterator[None]:
    """Join the cluster of ``RAY_ADDRESS`` or of the settings, or start a local Ray and stop it afterwards.

    Inside another session (several stages in one process) it does nothing.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(WORKER_ENVIRONMENT)
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the new default, without its notice
    # Every actor of Ray Data whose constructor takes arguments makes the core print an error line.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
    else:
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    _session["local"] = not address
    try:
        yield
    finally:
        _session["local"] = False
        ray.shutdown()


@contextmanager
def progress(
    what: str,
    total: int,
    count: Callable[[], int],
    *,
    detail: Callable[[], str] = str,
    starting: str = "",
    every_s: float = 5.0,
) -> Iterator[None]:
    """Log ``count()`` of ``total`` with rate and time left every few seconds while the block runs.

    Args:
        what: what stands before the count, for example "images encoded:".
        total: when it is done.
        count: how many are done, also before this start; called from a thread.
        detail: more text for the line, for example the loss.
        starting: text of the lines until the count changes for the first time, for example "starting 2 workers".
        every_s: seconds between lines.
    """
    stop, pace = threading.Event(), Pace()

    def watch() -> None:
        before, has_begun = count(), not starting
        pace.per_s(before, time.monotonic())
        while not stop.wait(every_s):
            done = count()
            has_begun = has_begun or done != before
            if not has_begun:
                _LOG.info("%s", starting)
                continue
            _LOG.info("%s%s", progress_line(what, done, total, pace.per_s(done, time.monotonic())), detail())

    # Its lines are about what this thread's are about.
    thread = threading.Thread(target=copy_context().run, args=(watch,), name=f"progress of {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def error_of_ours(error: ray.exceptions.RayError) -> str | None:
    """``StorageError: ...`` where a worker failed with an error of ours, of which Ray Data passes on the text alone."""
    found = re.findall(r"^meteor\.errors\.(\w+: .+)$", str(error), re.MULTILINE)
    return found[-1] if found else None


def job_metadata() -> dict[str, str]:
    """Of the Ray job that started this process: its submission id, and what the submitter said of it; empty elsewhere."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})


def num_blocks(num_items: int, items_per_block: int) -> int:
    """Blocks for `ray.data.from_items`: enough to stream and to spread, not so many that tasks are all overhead."""
    return max(1, min(num_items // items_per_block, 4096))
