"""MLflow run of a stage: recorded in the stage's folder first, then sent to the server as soon as it can be reached."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from meteor import storage
from meteor.cache import FeatureCache
from meteor.checksums import read_checked_json, write_checked_json
from meteor.config import RunSettings, settings_digest
from meteor.errors import DamagedError, NotFoundError, TrackingError
from meteor.runs.folder import StageFolder
from meteor.runs.reading import read_stage
from meteor.tracking import RunEnd, Tracker, public_uri

_LOG = logging.getLogger(__name__)
_RETRY_S = 60.0
# End of a stage -> MLflow's word for it.
StageEnd = Literal["finished", "failed", "stopped"]
_ENDS: dict[str, RunEnd] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class StageLog:
    """MLflow run of a stage, recorded in ``tracking.json`` and ``metrics/`` of the stage's folder.

    An outage of the server stops no stage, as the record can be sent at any later time. Sending it twice changes nothing.

    Args:
        settings: settings of the run.
        folder: the stage's folder; its digest is the tag by which the MLflow run is found again.
        content: content of ``tracking.json``; see `new`.
    """

    def __init__(self, settings: RunSettings, folder: StageFolder, content: dict[str, Any]) -> None:
        self._settings, self._folder = settings, folder
        self._content = content
        # A copy in another process connects again, so that the tracker is not pickled; it need not search for the run again.
        self._tracker: Tracker | None = None
        self._run_id: str | None = None
        self._retry_at = -math.inf
        self._page_shown = False

    @classmethod
    def new(
        cls, settings: RunSettings, folder: StageFolder, *, params: Mapping[str, Any], tags: dict[str, str]
    ) -> "StageLog":
        """Record that a stage starts, for the first time or again."""
        content = {"params": params, "tags": tags, "datasets": [], "rows": [], "pipeline_rows": [], "files": []}
        log = cls(settings, folder, {**content, "status": "running", "sent": False})
        log._save()
        return log

    @classmethod
    def unsent(cls, settings: RunSettings, folder: StageFolder) -> "StageLog | None":
        """Read the record of a stage that has ended; None if MLflow has received it completely."""
        try:
            content = read_checked_json(_file(folder))
        except NotFoundError:
            return None
        except DamagedError as error:
            _LOG.warning("%s. This stage's record is not sent to MLflow", error)
            return None
        return None if content["sent"] else cls(settings, folder, content)

    def cache(self, cache: FeatureCache, *, context: str) -> None:
        """Add a cache version as an input, so that ``dataset.name = '<cache key>'`` finds all its runs in MLflow."""
        self.dataset(name=cache.identity.key, digest=cache.digest, source=cache.uri, context=context)

    def dataset(self, *, name: str, digest: str, source: str, context: str) -> None:
        """Add an input; see `Tracker.log_dataset`."""
        self._add("datasets", {"name": name, "digest": digest, "source": source, "context": context})

    def metrics(self, values: Mapping[str, Any], *, pipeline: bool = False) -> None:
        """Log numbers about the whole stage; with ``pipeline``, on the pipeline's MLflow run as well."""
        row = {**values, "step": 0, "time_ms": int(time.time() * 1000)}
        for key in ("rows", "pipeline_rows")[: 2 if pipeline else 1]:
            self._add(key, row)

    def file(self, name: str) -> None:
        """Attach a small file of the stage's folder to the MLflow run."""
        self._add("files", name)

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        self._content["tags"][name] = value
        self._save()

    def live(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of ``metrics/`` while the stage runs; if the server does not answer, `close` sends them later."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._run_id is None:
                # The folder holds these rows and all before them.
                self._send()
            else:
                self._tracker = self._tracker or make_tracker(self._settings)
                self._tracker.log_metrics(self._run_id, rows)
        except TrackingError:
            self._retry_at = time.monotonic() + _RETRY_S

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tracker": None}

    def open(self) -> None:
        """Send the record at the start of the stage."""
        self._try("The stage continues; its MLflow run is sent later")

    def close(self, end: StageEnd) -> None:
        """Record the end of the stage, and send everything now or at the next start."""
        self._content["status"] = end
        self._save()
        self.send_all()

    def send_all(self) -> bool:
        """Send the whole record of a stage that has ended; return whether the server answered."""
        return self._try(f"The MLflow run is kept in {self._folder.uri}: run the same command again to send it")

    def _try(self, advice: str) -> bool:
        try:
            self._send()
        except TrackingError as error:
            _LOG.warning("%s. %s", error, advice)
            return False
        return True

    def _send(self) -> None:
        content, status, used_by = self._content, self._content["status"], self._settings.tracking.used_by
        stage = self._folder.stage
        tracker = make_tracker(self._settings)
        parent, name = parent_run(tracker, self._settings), f"{self._settings.name} {stage}"
        if used_by:
            name = f"{stage} of {', '.join(used_by)}"
        run_id = tracker.run(name, self._folder.digest, parent=parent, tags=content["tags"])
        tracker.log_params(run_id, content["params"])
        if not used_by:
            # The pipeline's run gets them too, so that two variants can be compared in MLflow without searching their stages.
            tracker.log_params(parent, content["params"])
            tracker.backfill(parent, content["pipeline_rows"])
        for dataset in content["datasets"]:
            tracker.log_dataset(run_id, **dataset)
        tracker.backfill(run_id, [*content["rows"], *read_stage(self._folder.uri).metrics])
        for file in content["files"]:
            tracker.log_file(run_id, file, storage.read_bytes(storage.join_below(self._folder.uri, file)))
        tracker.set_tags(run_id, content["tags"])
        self._tracker, self._run_id = tracker, run_id
        if not self._page_shown and (page := tracker.page(run_id)):
            _LOG.info("[%s] %s in MLflow: %s", self._settings.name, stage, page)
        self._page_shown = True
        if status != "running":
            tracker.finish(run_id, _ENDS[status])
            if not used_by:
                tracker.finish(parent, _ENDS[status])
            content["sent"] = True
            self._save()

    def _add(self, key: str, value: Any) -> None:
        self._content[key].append(value)
        self._save()

    def _save(self) -> None:
        self._folder.check_claim()
        write_checked_json(_file(self._folder), self._content)


def _file(folder: StageFolder) -> str:
    return storage.join(folder.uri, "tracking.json")


def parent_run(tracker: Tracker, settings: RunSettings) -> str:
    """Return the id of the MLflow run above a stage: the pipeline's, or the study's if several variants share the stage."""
    study, above = settings.tracking.study, None
    if study is not None:
        above = _study_run(tracker, study, settings.output)
        if settings.tracking.used_by:
            return above
    kind = "pipeline" if study is None else "variant"
    return tracker.run(settings.name, pipeline_digest(settings), parent=above, tags={"meteor.kind": kind})


def study_run(tracker: Tracker, settings: RunSettings) -> str:
    """Return the id of the MLflow run of the study that a run's settings describe."""
    return _study_run(tracker, settings.name, settings.output)


def _study_run(tracker: Tracker, study: str, output: str) -> str:
    return tracker.run(study, settings_digest({"study": study, "output": output}), tags={"meteor.kind": "study"})


def pipeline_digest(settings: RunSettings) -> str:
    """Return the tag by which the MLflow run of a whole run file is found: a digest of name, output and study."""
    study = {"study": settings.tracking.study} if settings.tracking.study else {}
    return settings_digest({"name": settings.name, "output": settings.output, **study})


def make_tracker(settings: RunSettings) -> Tracker:
    """Connect to the tracking server; raises TrackingError if it cannot be reached."""
    return Tracker(tracking_uri(settings), settings.tracking.experiment)


def where_to_compare(settings: RunSettings) -> str:
    """Return the address of the tracking server, or the command that shows the runs of a database."""
    uri = public_uri(tracking_uri(settings))
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def has_server(settings: RunSettings) -> bool:
    """Return whether runs are sent to a server or database that the user names, instead of a file beside the results."""
    return bool(settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))


def tracking_uri(settings: RunSettings) -> str:
    """Return the URI of the tracking store.

    It is the setting, else MLFLOW_TRACKING_URI, else a SQLite file beside the results. SQLite cannot lie on S3: for outputs
    there, the file is in the working directory.
    """
    folder = "." if "://" in settings.output else settings.output
    return (
        settings.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{storage.absolute(folder)}/mlflow.db"
    )
