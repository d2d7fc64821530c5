"""MLflow run of a stage while the stage runs on Ray."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meteor import storage
from meteor.checkpoint.folder import complete_checkpoints
from meteor.config import RunSettings
from meteor.errors import StorageError, SupersededError
from meteor.runs.folder import StageFolder, Summary, git_commit
from meteor.runs.mlflow_log import StageLog, has_server
from meteor.stages import TRAINING_STAGES
from meteor.stopping import Stopped, raise_if_stopped, stop_signal
from pipelines.ray_parts.logs import log_context
from pipelines.ray_parts.runtime import job_metadata

_LOG = logging.getLogger(__name__)


@contextmanager
def tracked(settings: RunSettings, folder: StageFolder, params: dict[str, Any]) -> Iterator[StageLog]:
    """Keep a stage's MLflow run open while the block runs; it ends as finished, failed, or stopped by a signal.

    If the server cannot be reached, the block runs all the same, see `StageLog`.

    Args:
        settings: settings of the run.
        folder: the stage's folder.
        params: parameters of the MLflow run.

    Raises:
        Stopped: a signal stopped the block; the text says from where the same command goes on.
    """
    # A thread of a study must not start Ray again after the main thread has stopped it.
    raise_if_stopped()
    tags = {"meteor.kind": "stage", "meteor.stage": folder.stage, "meteor.run": settings.name}
    tags |= {"meteor.folder": folder.uri, "mlflow.source.git.commit": git_commit() or "unknown"}
    tags |= job_tags()
    tracking = settings.tracking
    if tracking.study is not None:
        tags["meteor.study"] = tracking.study
    if tracking.used_by:
        tags["used_by"] = ", ".join(tracking.used_by)
    if job_metadata() and not has_server(settings):
        _LOG.warning(
            "MLflow: no server is set, and the database in this job's own folder is deleted with the job. Set "
            "MLFLOW_TRACKING_URI on all nodes, or tracking.uri"
        )
    # Parameters go through JSON, so that tuples equal the lists that are read back.
    log = StageLog.new(settings, folder, params=json.loads(json.dumps(params, default=str)), tags=tags)
    with log_context(run=settings.name, stage=folder.stage, digest=folder.digest[:12]):
        log.open()
        try:
            yield log
        # The MLflow run belongs to the newer start now.
        except SupersededError:
            raise
        except BaseException as error:
            # After a signal, Ray ends under the threads of a study, which then see errors of any kind.
            if isinstance(error, KeyboardInterrupt) or stop_signal() is not None:
                log.close("stopped")
                raise Stopped(f"[{settings.name}] {folder.stage}: stopped; {_continuation(folder)}") from error
            log.close("failed")
            raise
        log.close("finished")


def _continuation(folder: StageFolder) -> str:
    """Say from where the same command goes on."""
    where = "where it stopped"
    if folder.stage in TRAINING_STAGES:
        try:
            done = complete_checkpoints(storage.join(folder.uri, "checkpoints"))
            where = f"step {int(done[-1].rpartition('_')[2])}" if done else "its first step"
        except StorageError as error:
            where = f"its newest checkpoint ({error})"
    return f"the same command goes on from {where}"


def reuse(settings: RunSettings, folder: StageFolder, summary: Summary) -> Summary:
    """Return the summary of a finished stage, after sending MLflow everything that an outage kept from it."""
    log = StageLog.unsent(settings, folder)
    if log is not None and log.send_all():
        _LOG.info("%s: the MLflow run, which was incomplete, has been sent", folder.stage)
    return summary


def job_tags() -> dict[str, str]:
    """Return tags that lead from MLflow to the Ray job of this process; empty outside a job."""
    job = job_metadata()
    tags = {"ray.submission_id": job.get("job_submission_id"), "ray.dashboard": job.get("job_page")}
    return {name: value for name, value in tags.items() if value}
