"""Metrics of a training stage as JSONL segments in its folder, written before MLflow gets them."""

import json
from typing import Any

from meteor import storage
from meteor.errors import NotFoundError


def segment_uri(run_uri: str, start_step: int) -> str:
    """Return the URI of the segment of a worker group that started after ``start_step`` steps."""
    return storage.join(run_uri, "metrics", f"from_{start_step:08d}.jsonl")


class MetricsSegment:
    """Metrics of one worker group.

    Each write replaces the whole segment, as object stores cannot append. A group that resumes from a checkpoint begins a new
    segment, and readers drop the rows of older segments after its first step.
    """

    def __init__(self, run_uri: str, start_step: int) -> None:
        self._uri = segment_uri(run_uri, start_step)
        self._lines: list[str] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._lines += [json.dumps(row) for row in rows]
        storage.write_bytes(self._uri, ("\n".join(self._lines) + "\n").encode())


def read_last(run_uri: str) -> dict[str, Any] | None:
    """Return the newest row, for progress lines; None before the first row."""
    segments = storage.list_objects(storage.join(run_uri, "metrics"))
    if not segments:
        return None
    try:
        lines = storage.read_bytes(segments[-1].uri).decode().splitlines()
    except NotFoundError:
        return None
    return json.loads(lines[-1])
