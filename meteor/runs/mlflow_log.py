"""What MLflow is told of a stage: it stands in the run's folder first, and the server gets a copy when it is there."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from meteor import storage
from meteor.cache import FeatureCache
from meteor.config import RunSettings, settings_digest
from meteor.errors import NotFoundError, TrackingError
from meteor.runs.reading import read_stage_run
from meteor.tracking import Tracker, public_uri

_LOG = logging.getLogger(__name__)
_RETRY_S = 60.0


class StageLog:
    """A stage's entry in MLflow, made whole from ``tracking.json`` and ``metrics/`` of its folder at any time.

    An outage of the server stops nothing. Sending twice changes nothing.

    Args:
        settings: of the run.
        stage: name of the stage.
        digest: of the stage's run: the tag by which MLflow's run is found again.
        uri: the run's folder.
        content: what ``tracking.json`` holds, see `new`.
    """

    def __init__(self, settings: RunSettings, stage: str, digest: str, uri: str, content: dict[str, Any]) -> None:
        self._settings, self._stage, self._digest, self._uri = settings, stage, digest, uri
        self._content = content
        # Apart, as a copy in another process needs a connection of its own, and no second look for the run.
        self._run_id: str | None = None
        self._tracker: Tracker | None = None
        self._retry_at = -math.inf
        self._told = False

    @classmethod
    def new(
        cls,
        settings: RunSettings,
        stage: str,
        digest: str,
        uri: str,
        *,
        params: Mapping[str, Any],
        tags: dict[str, str],
    ) -> "StageLog":
        """Of a stage that starts, anew or again."""
        content = {"params": params, "tags": tags, "datasets": [], "rows": [], "pipeline_rows": [], "files": []}
        log = cls(settings, stage, digest, uri, {**content, "status": "running", "sent": False})
        log._save()
        return log

    @classmethod
    def unsent(cls, settings: RunSettings, stage: str, digest: str, uri: str) -> "StageLog | None":
        """Of a stage that has ended, if MLflow lacks something of it."""
        try:
            content = storage.read_json(_file(uri))
        except NotFoundError:
            return None
        return None if content["sent"] else cls(settings, stage, digest, uri, content)

    def cache(self, cache: FeatureCache, *, context: str) -> None:
        """Name the cache version as an input: ``dataset.name = '<cache key>'`` in MLflow's search finds all its runs."""
        self.dataset(name=cache.identity.key, digest=cache.digest, source=cache.uri, context=context)

    def dataset(self, *, name: str, digest: str, source: str, context: str) -> None:
        """Name an input; see `Tracker.log_dataset`."""
        self._add("datasets", {"name": name, "digest": digest, "source": source, "context": context})

    def metrics(self, values: Mapping[str, Any], *, pipeline: bool = False) -> None:
        """Numbers of the stage as a whole; on the pipeline's run as well where wanted."""
        row = {**values, "step": 0, "time_ms": int(time.time() * 1000)}
        for key in ("rows", "pipeline_rows")[: 2 if pipeline else 1]:
            self._add(key, row)

    def file(self, name: str) -> None:
        """A small file of the run's folder, to be kept with MLflow's run."""
        self._add("files", name)

    def tag(self, name: str, value: str) -> None:
        self._content["tags"][name] = value
        self._save()

    def live(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of ``metrics/`` while the stage runs, as far as the server is there; `close` sends what is missing."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._run_id is None:
                # It takes these rows from the folder, and what came before them.
                self._send()
            else:
                self._tracker = self._tracker or make_tracker(self._settings)
                self._tracker.log_metrics(self._run_id, rows)
        except TrackingError:
            self._retry_at = time.monotonic() + _RETRY_S

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tracker": None}

    def open(self) -> None:
        """The stage starts."""
        self._try("The stage goes on, and what MLflow is to know is sent later")

    def close(self, *, failed: bool) -> None:
        """The stage has ended: send everything, now or when it is started again."""
        self._content["status"] = "failed" if failed else "finished"
        self._save()
        self.settle()

    def settle(self) -> bool:
        """Make MLflow's run of a stage that has ended as it is; whether the server was there."""
        return self._try(f"What MLflow is to know is in {self._uri}: run the same command again to send it")

    def _try(self, otherwise: str) -> bool:
        try:
            self._send()
        except TrackingError as error:
            _LOG.warning("%s. %s", error, otherwise)
            return False
        return True

    def _send(self) -> None:
        content, status, used_by = self._content, self._content["status"], self._settings.tracking.used_by
        tracker = make_tracker(self._settings)
        parent, name = parent_run(tracker, self._settings), f"{self._settings.name} {self._stage}"
        if used_by:
            name = f"{self._stage} of {', '.join(used_by)}"
        run_id = tracker.run(name, self._digest, parent=parent, tags=content["tags"])
        tracker.log_params(run_id, content["params"])
        if not used_by:
            # On the pipeline's run as well: comparing two variants in MLflow then needs no search for their stages.
            tracker.log_params(parent, content["params"])
            tracker.backfill(parent, content["pipeline_rows"])
        for dataset in content["datasets"]:
            tracker.log_dataset(run_id, **dataset)
        tracker.backfill(run_id, [*content["rows"], *read_stage_run(self._uri).metrics])
        for file in content["files"]:
            tracker.log_file(run_id, file, storage.read_bytes(storage.join(self._uri, file)))
        tracker.set_tags(run_id, content["tags"])
        self._tracker, self._run_id = tracker, run_id
        if not self._told and (page := tracker.page(run_id)):
            _LOG.info("[%s] %s in MLflow: %s", self._settings.name, self._stage, page)
        self._told = True
        if status != "running":
            tracker.finish(run_id, failed=status == "failed")
            if status == "finished" and not used_by:
                tracker.finish(parent)
            content["sent"] = True
            self._save()

    def _add(self, key: str, value: Any) -> None:
        self._content[key].append(value)
        self._save()

    def _save(self) -> None:
        storage.write_json(_file(self._uri), self._content)


def _file(uri: str) -> str:
    return storage.join(uri, "tracking.json")


def parent_run(tracker: Tracker, settings: RunSettings) -> str:
    """MLflow's run that a run's stages belong to: its own; or the study's, for stages that several variants share."""
    study, above = settings.tracking.study, None
    if study is not None:
        above = _study_run(tracker, study, settings.output)
        if settings.tracking.used_by:
            return above
    kind = "pipeline" if study is None else "variant"
    return tracker.run(settings.name, pipeline_digest(settings), parent=above, tags={"meteor.kind": kind})


def study_run(tracker: Tracker, settings: RunSettings) -> str:
    """MLflow's run of the study that a run's settings describe."""
    return _study_run(tracker, settings.name, settings.output)


def _study_run(tracker: Tracker, study: str, output: str) -> str:
    return tracker.run(study, settings_digest({"study": study, "output": output}), tags={"meteor.kind": "study"})


def pipeline_digest(settings: RunSettings) -> str:
    """What the stages of one run share in MLflow."""
    study = {"study": settings.tracking.study} if settings.tracking.study else {}
    return settings_digest({"name": settings.name, "output": settings.output, **study})


def make_tracker(settings: RunSettings) -> Tracker:
    """Raises TrackingError where the server cannot be reached."""
    return Tracker(tracking_uri(settings), settings.tracking.experiment)


def where_to_compare(settings: RunSettings) -> str:
    """The server's address, or the command that shows the database's runs."""
    uri = public_uri(tracking_uri(settings))
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def has_server(settings: RunSettings) -> bool:
    """Whether runs go to a server or a database that somebody named."""
    return bool(settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))


def tracking_uri(settings: RunSettings) -> str:
    """The setting, else MLFLOW_TRACKING_URI, else SQLite beside the results (in the working directory for s3 outputs)."""
    folder = "." if "://" in settings.output else settings.output
    return (
        settings.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{storage.absolute(folder)}/mlflow.db"
    )
