"""Client of one MLflow experiment: runs found by tag, metrics that never stop a job, lineage from caches to runs."""

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from meteor.errors import TrackingError
from meteor.formatting import flatten
from meteor.optional import import_optional
from meteor.secrets import redact
from meteor.tracking.database import ready_database
from meteor.tracking.names import mlflow_name, public_uri
from meteor.tracking.outages import reaching

RunEnd = Literal["FINISHED", "FAILED", "KILLED"]

_LOG = logging.getLogger(__name__)
_DIGEST_TAG = "meteor.digest"
_PARENT_TAG = "mlflow.parentRunId"
# MLflow's defaults (7 retries of up to 120 s) would delay training for minutes at every report while the server is away.
_HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
# MLflow logs every database migration at level INFO, and the traceback of every database error, which it raises too.
_LEVELS = {"alembic": logging.WARNING, "mlflow.tracking": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL}
# Seconds without attempts to send metrics after the server could not be reached.
_OUTAGE_PAUSE_S = 60.0
# Limits of MLflow's API per request and per value.
_MAX_PARAMS, _MAX_METRICS, _MAX_PARAM_LENGTH, _MAX_DATASET_DIGEST = 100, 1000, 6000, 36
_MAX_CHILDREN = 5000
# Codes of MLflow's errors about a value, and about an experiment that another process has just made.
_REFUSED, _EXISTS = "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"


def experiment_page(uri: str, experiment: str, tags: Mapping[str, str]) -> str | None:
    """Return the address of the web page that lists an experiment's runs with certain tags.

    Args:
        uri: URI of the tracking server.
        experiment: name of the experiment.
        tags: tags that the listed runs have.

    Returns:
        The address; None if the URI is not a server's, or the server does not answer.
    """
    if not uri.startswith("http"):
        return None
    try:
        tracker = Tracker(uri, experiment)
    except TrackingError as error:
        _LOG.warning("%s", error)
        return None
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return f"{public_uri(uri).rstrip('/')}/#/experiments/{tracker.experiment_id}/runs?searchFilter={quote(wanted)}"


@dataclass(frozen=True)
class ChildRun:
    """Run that is the child of another run.

    Attributes:
        name: name of the run.
        tags: tags by name, MLflow's own tags included.
        metrics: latest value of each metric by name.
    """

    name: str
    tags: dict[str, str]
    metrics: dict[str, float]


class Tracker:
    """Client of one experiment on a tracking server or in a database.

    Runs are found by a digest tag, so that a restarted stage continues its own run. While metrics are logged, an outage is
    never raised: it is logged once, and sending is tried again after a minute. The metrics are in the run's JSONL file
    already, and `backfill` sends the missing ones.

    Args:
        uri: ``sqlite:///...`` or ``http(s)://...``.
        experiment: name of the experiment, which is created if absent.

    Raises:
        TrackingError: the server cannot be reached.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        for name, value in {**_QUIET, **_HTTP_SETTINGS}.items():
            os.environ.setdefault(name, value)
        mlflow = import_optional("mlflow", needed_for="tracking", install="pip install mlflow")
        for noisy, level in _LEVELS.items():
            logging.getLogger(noisy).setLevel(level)
        self.uri, self.experiment = uri, experiment
        # The error of a server and the error of a database; both carry a code.
        self._entities, self._mlflow_error = mlflow.entities, mlflow.exceptions.MlflowException
        self._outage_until: float | None = None
        with self._reaching(), ready_database(uri):
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment_id(experiment)

    def run(self, name: str, digest: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Return the id of the run with a digest tag; create the run if absent, and reopen it if it has ended.

        Args:
            name: name of a new run.
            digest: value of the digest tag.
            parent: id of a new run's parent run.
            tags: further tags of a new run.

        Raises:
            TrackingError: the server cannot be reached.
        """
        with self._reaching():
            found = self._client.search_runs(
                [self.experiment_id], filter_string=f"tags.`{_DIGEST_TAG}` = '{digest}'", max_results=1
            )
            if found:
                run_id = found[0].info.run_id
                self._client.update_run(run_id, status="RUNNING")
            else:
                given = {mlflow_name(key): redact(value) for key, value in (tags or {}).items()}
                all_tags = {_DIGEST_TAG: digest, **given, **({_PARENT_TAG: parent} if parent else {})}
                run_id = self._client.create_run(self.experiment_id, run_name=name, tags=all_tags).info.run_id
            return run_id

    def children(self, run_id: str) -> list[ChildRun]:
        """List a run's children, oldest first."""
        with self._reaching():
            found = self._client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.`{_PARENT_TAG}` = '{run_id}'",
                order_by=["attributes.start_time ASC"],
                max_results=_MAX_CHILDREN,
            )
            return [ChildRun(run.info.run_name, run.data.tags, run.data.metrics) for run in found]

    def log_params(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Log settings with dotted names; settings logged before keep their first value, as MLflow requires."""
        with self._reaching():
            present = self._client.get_run(run_id).data.params
            flat = {key: redact(str(value))[:_MAX_PARAM_LENGTH] for key, value in flatten(settings).items()}
            named = {mlflow_name(key): value for key, value in flat.items()}
            new = [self._entities.Param(key, value) for key, value in named.items() if key not in present]
            self._log_batches(run_id, "params", new, _MAX_PARAMS)

    def log_dataset(self, run_id: str, *, name: str, digest: str, source: str, context: str) -> None:
        """Record a cache or sample file as a run's input; the search ``dataset.digest = '...'`` then finds its runs."""
        dataset = self._entities.Dataset(
            name=name[:500], digest=digest[:_MAX_DATASET_DIGEST], source_type="local", source=source
        )
        tag = self._entities.InputTag(key="mlflow.data.context", value=context)
        with self._reaching():
            self._client.log_inputs(run_id, datasets=[self._entities.DatasetInput(dataset, tags=[tag])])

    def log_metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the numbers of rows with a ``step`` and an optional ``time_ms``; an outage is logged once, never raised."""
        if self._outage_until is not None and time.monotonic() < self._outage_until:
            return
        now_ms = int(time.time() * 1000)
        try:
            with self._reaching():
                self._send(
                    run_id, [metric for row in rows for metric in self._metrics(row, row.get("time_ms", now_ms))]
                )
            self._outage_until = None
        except TrackingError as error:
            if self._outage_until is None:
                _LOG.warning("%s; metrics stay in the run's files and are sent later", error)
            self._outage_until = time.monotonic() + _OUTAGE_PAUSE_S

    def backfill(self, run_id: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """Log the numbers of rows that MLflow lacks.

        Numbers are compared by name, step and time, because a row may have been sent in part. A step that is repeated after a
        resume therefore has two points in MLflow, which cannot delete points. The later point is in the run's files too, and
        is the metric's latest value.

        Args:
            run_id: id of the run.
            rows: rows for `log_metrics`, each with ``time_ms``.

        Returns:
            The number of logged values.

        Raises:
            TrackingError: the server cannot be reached.
        """
        metrics = [metric for row in rows for metric in self._metrics(row, row["time_ms"])]
        with self._reaching():
            known = {
                (metric.key, metric.step, metric.timestamp)
                for key in {metric.key for metric in metrics}
                for metric in self._client.get_metric_history(run_id, key)
            }
            missing = [metric for metric in metrics if (metric.key, metric.step, metric.timestamp) not in known]
            self._send(run_id, missing)
        return len(missing)

    def log_file(self, run_id: str, name: str, data: bytes) -> None:
        """Store a small file as an artifact of the run."""
        with tempfile.TemporaryDirectory() as folder, self._reaching():
            file = Path(folder) / Path(name).name
            file.write_bytes(data)
            parent = str(Path(name).parent)
            self._client.log_artifact(run_id, str(file), artifact_path=None if parent == "." else parent)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        with self._reaching():
            for key, value in tags.items():
                self._client.set_tag(run_id, mlflow_name(key), redact(str(value)))

    def finish(self, run_id: str, status: RunEnd = "FINISHED") -> None:
        """End a run; "KILLED" is MLflow's word for a run that was stopped and may go on."""
        with self._reaching():
            self._client.set_terminated(run_id, status=status)

    def _metrics(self, row: Mapping[str, Any], time_ms: int) -> list[Any]:
        """Return a row's numbers as MLflow's metrics."""
        return [
            self._entities.Metric(mlflow_name(key), float(value), time_ms, int(row["step"]))
            for key, value in row.items()
            if key not in {"step", "time_ms"} and isinstance(value, int | float)
        ]

    def _send(self, run_id: str, metrics: Sequence[Any]) -> None:
        self._log_batches(run_id, "metrics", metrics, _MAX_METRICS)

    def _log_batches(self, run_id: str, kind: str, values: Sequence[Any], most: int) -> None:
        """Log metrics or params; a value that MLflow refuses is named in the log, and loses no other value."""
        for start in range(0, len(values), most):
            batch = values[start : start + most]
            try:
                self._client.log_batch(run_id, **{kind: batch})
            except self._mlflow_error as error:
                if error.error_code != _REFUSED:
                    raise
                refused = self._refused(run_id, kind, batch)
                # Then the fault is not a value's.
                if len(refused) == len(batch) > 1:
                    raise
                for value, problem in refused:
                    _LOG.warning("MLflow refuses %s = %r: %s", value.key, value.value, redact(str(problem)))

    def _refused(self, run_id: str, kind: str, values: Sequence[Any]) -> list[tuple[Any, Exception]]:
        """Log values one by one; return those that MLflow refuses, with its errors."""
        refused: list[tuple[Any, Exception]] = []
        for value in values:
            try:
                self._client.log_batch(run_id, **{kind: [value]})
            except self._mlflow_error as error:
                if error.error_code != _REFUSED:
                    raise
                refused.append((value, error))
        return refused

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        # MLflow would put artifacts of a SQLite store into the working directory; they belong beside the database.
        folder = self.uri.removeprefix("sqlite:///")
        location = str(Path(folder).parent / "mlartifacts" / name) if folder != self.uri else None
        try:
            return self._client.create_experiment(name, artifact_location=location)
        except self._mlflow_error as error:
            if error.error_code != _EXISTS:
                raise
            return self._client.get_experiment_by_name(name).experiment_id

    def page(self, run_id: str) -> str | None:
        """Return the address of a run's web page; None without a server."""
        if not self.uri.startswith("http"):
            return None
        return f"{public_uri(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def _reaching(self) -> AbstractContextManager[None]:
        return reaching(self.uri)
