"""Read a stage's folder back: settings, summary and metrics."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meteor import storage
from meteor.errors import DataError

_SEGMENT_NAME = re.compile(r"/from_(\d+)\.jsonl$")


@dataclass(frozen=True)
class StageRecord:
    """A stage's folder as it was read.

    Attributes:
        stage: "pretrain", "finetune" or "evaluate".
        uri: the run's folder.
        settings: resolved settings, nested.
        summary: what ``summary.json`` holds; None while the run has not finished.
        metrics: one row a reported step, in order. Its counts and ``seconds`` are those since the previous row.
        recorded: the rest of ``run.json``: name, digest, parent, and whatever else was recorded (index digest, cache
            key, git commit, ``versions``).
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
    """Read ``run.json``, ``summary.json`` if there, and ``metrics/*.jsonl`` of a run's folder (local or S3).

    Raises:
        NotFoundError: the folder holds no ``run.json``.
        DataError: a metrics file holds a line that is not JSON.
    """
    recorded: dict[str, Any] = dict(storage.read_json(storage.join(uri, "run.json")))
    summary_uri = storage.join(uri, "summary.json")
    return StageRecord(
        stage=recorded.pop("stage"),
        uri=uri,
        settings=recorded.pop("settings"),
        summary=storage.read_json(summary_uri) if storage.exists(summary_uri) else None,
        metrics=_read_metrics(storage.join(uri, "metrics")),
        recorded=recorded,
    )


def _read_metrics(uri: str) -> list[dict[str, Any]]:
    """Rows of all segments in order; a segment named by step s replaces what earlier ones did after s and lost."""
    segments = []
    for info in storage.list_objects(uri):
        if match := _SEGMENT_NAME.search(info.uri):
            segments.append((int(match.group(1)), info.uri))
    rows: list[dict[str, Any]] = []
    for start, segment_uri in sorted(segments):
        rows = [row for row in rows if row["step"] <= start] + _read_rows(segment_uri)
    return rows


def _read_rows(uri: str) -> list[dict[str, Any]]:
    # What follows the last newline was being written when the process died: it is no row yet.
    lines = storage.read_bytes(uri).decode("utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{uri}, line {number} is not JSON ({error}): {line[:80]!r}; remove the line") from error
    return rows
