"""A run's metrics as JSONL segments in its folder: written before anything else hears of them."""

import json
from typing import Any

from meteor import storage
from meteor.errors import NotFoundError


def segment_uri(run_uri: str, start_step: int) -> str:
    """The segment of a worker group that started after ``start_step`` steps."""
    return storage.join(run_uri, "metrics", f"from_{start_step:08d}.jsonl")


class MetricsSegment:
    """Rows of one worker group. The whole segment is put anew each time: object stores cannot append.

    A group that resumes from a checkpoint opens a segment of its own; readers drop what an older segment has beyond that.
    """

    def __init__(self, run_uri: str, start_step: int) -> None:
        self._uri = segment_uri(run_uri, start_step)
        self._lines: list[str] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._lines += [json.dumps(row) for row in rows]
        storage.write_bytes(self._uri, ("\n".join(self._lines) + "\n").encode())


def read_last(run_uri: str) -> dict[str, Any] | None:
    """The newest row, for progress; None before the first."""
    segments = storage.list_objects(storage.join(run_uri, "metrics"))
    if not segments:
        return None
    try:
        lines = storage.read_bytes(segments[-1].uri).decode().splitlines()
    except NotFoundError:
        return None
    return json.loads(lines[-1])
