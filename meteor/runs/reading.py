"""Reading of a stage's folder: settings, summary and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meteor import storage
from meteor.checksums import check_folder, read_checked_json
from meteor.errors import NotFoundError
from meteor.runs.metrics import read_listed, read_running


@dataclass(frozen=True)
class StageRecord:
    """Content of a stage's folder.

    Attributes:
        stage: "pretrain", "finetune" or "evaluate".
        uri: URI of the stage's folder.
        settings: resolved settings, nested.
        summary: content of ``summary.json``; None while the stage has not finished.
        metrics: one row per reported step, in order; counts and ``seconds`` of a row begin at the previous row.
        recorded: other content of ``run.json``: name, digest, parent, index digest, cache key, git commit, ``versions``.
    """

    stage: str
    uri: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    metrics: list[dict[str, Any]]
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary is not None


def read_stage(uri: str) -> StageRecord:
    """Read ``run.json``, ``metrics/*.jsonl`` and, if it exists, ``summary.json`` of a stage's folder (local or S3).

    All files of a finished stage except its checkpoints and its model are compared with their checksums.

    Raises:
        NotFoundError: the folder holds no ``run.json``.
        DamagedError: a file is not what was written.
        DataError: the metrics of an unfinished stage hold a line that is not JSON.
    """
    recorded = read_checked_json(storage.join(uri, "run.json"))
    summary = _read_summary(storage.join(uri, "summary.json"))
    if summary is not None:
        check_folder(uri, is_required=True)
    return StageRecord(
        stage=recorded.pop("stage"),
        uri=uri,
        settings=recorded.pop("settings"),
        summary=summary,
        metrics=_read_metrics(uri, summary),
        recorded=recorded,
    )


def read_metrics(uri: str) -> list[dict[str, Any]]:
    """Read the rows of a stage's metrics alone; for errors see `read_stage`."""
    return _read_metrics(uri, _read_summary(storage.join(uri, "summary.json")))


def _read_metrics(uri: str, summary: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    # Stages without steps list no metrics.
    return read_running(uri) if summary is None else read_listed(uri, summary["extra"].get("metrics", []))


def _read_summary(uri: str) -> dict[str, Any] | None:
    try:
        return read_checked_json(uri)
    except NotFoundError:
        return None
