"""Reading of a stage's folder: settings, summary and metrics."""

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
    """Read the rows of all segments in order.

    A segment that starts after step s replaces later rows of older segments: those steps were lost when their workers died.
    """
    segments = []
    for info in storage.list_objects(uri):
        if match := _SEGMENT_NAME.search(info.uri):
            segments.append((int(match.group(1)), info.uri))
    rows: list[dict[str, Any]] = []
    for start, segment_uri in sorted(segments):
        rows = [row for row in rows if row["step"] <= start] + _read_rows(segment_uri)
    return rows


def _read_rows(uri: str) -> list[dict[str, Any]]:
    # Text after the last newline is an unfinished row: the process died while it wrote.
    lines = storage.read_bytes(uri).decode("utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{uri}, line {number} is not JSON ({error}): {line[:80]!r}; remove the line") from error
    return rows
