"""MLflow run of a stage while the stage runs on Ray."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meteor.config import RunSettings
from meteor.errors import SupersededError
from meteor.runs.folder import StageFolder, Summary, git_commit
from meteor.runs.mlflow_log import StageLog, has_server
from pipelines.ray_parts.logs import log_context
from pipelines.ray_parts.runtime import job_metadata

_LOG = logging.getLogger(__name__)


@contextmanager
def tracked(settings: RunSettings, folder: StageFolder, params: dict[str, Any]) -> Iterator[StageLog]:
    """Keep a stage's MLflow run open while the block runs; it ends as finished, or as failed after an exception.

    If the server cannot be reached, the block runs all the same, see `StageLog`.

    Args:
        settings: settings of the run.
        folder: the stage's folder.
        params: parameters of the MLflow run.
    """
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
        except BaseException:
            log.close("failed")
            raise
        log.close("finished")


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
