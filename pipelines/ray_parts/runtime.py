"""Ray wiring that stages share: the session, the environment of workers, progress of long work."""

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

from meteor.clusters import joining
from meteor.config.settings import RuntimeSettings
from meteor.progress import Pace, progress_line
from meteor.stopping import keep_listening

_LOG = logging.getLogger(__name__)

# Set in the driver and in every worker before the packages that read these variables are imported.
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_TRAIN_V2_ENABLED": "1",
}


def worker_environment(num_gpus: float) -> dict[str, str]:
    """Return the environment of workers; without GPUs it tells DeepSpeed so, which must know before it is imported."""
    return WORKER_ENVIRONMENT if num_gpus else {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cpu"}


_session = {"local": False}


def session_is_local() -> bool:
    """Return whether this process started its own Ray, on this machine alone."""
    return _session["local"]


@contextmanager
def ray_session(settings: RuntimeSettings) -> Iterator[None]:
    """Join the cluster that the settings or ``RAY_ADDRESS`` name, or start a local Ray and stop it at the end of the block.

    Inside another session, when several stages share a process, it does nothing.

    Raises:
        ClusterError: the cluster cannot be joined, or Ray does not start on this machine.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(WORKER_ENVIRONMENT)
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    # The value is Ray's future default; setting it avoids a notice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Without this, Ray's core prints an error line for every Ray Data actor whose constructor takes arguments.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local = {} if address else {"include_dashboard": False, "log_to_driver": False}
    try:
        with joining(address), keep_listening():
            ray.init(address=address, logging_level=logging.WARNING, **local)
        _session["local"] = not address
        yield
    finally:
        stop_ray()


def stop_ray() -> None:
    """Leave the cluster, or stop the local Ray; what other threads of this process wait for ends with an error."""
    _session["local"] = False
    # Ray's C++ code takes back its handlers, and ours with them.
    with keep_listening():
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
        what: text before the count, for example "images encoded:".
        total: count at which the work is done.
        count: function that returns the current count, work of earlier starts included; it is called from a thread.
        detail: function that returns more text for the line, for example the loss.
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

    # The thread's lines get the fields of this thread's lines.
    thread = threading.Thread(target=copy_context().run, args=(watch,), name=f"progress of {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def find_meteor_error(error: ray.exceptions.RayError) -> str | None:
    """Find this project's error in an error of Ray, for example "StorageError: ..."; None if a worker failed otherwise.

    Ray Data passes on the text of a worker's error, but not its class.
    """
    found = re.findall(r"^meteor\.errors\.(\w+: .+)$", str(error), re.MULTILINE)
    return found[-1] if found else None


def job_metadata() -> dict[str, str]:
    """Return the metadata of the Ray job of this process: submission id and fields of the submitter; empty outside a job."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})


def job_id() -> str:
    """Return the submission id of the Ray job of this process; "" outside a job."""
    return job_metadata().get("job_submission_id", "")


def num_blocks(num_items: int, items_per_block: int) -> int:
    """Return the number of blocks for `ray.data.from_items`: enough to spread the work, few enough to limit overhead."""
    return max(1, min(num_items // items_per_block, 4096))
