"""Metrics of a training stage as JSONL segments in its folder, written before MLflow gets them.

Each group of workers writes a segment of its own, ``metrics/<number of its claim>_from_<step>.jsonl``. Checkpoints and the
summary list the segments that lead to them, with the rows that count and their checksum. Rows that a lost or superseded group
wrote after its last checkpoint are thus never mixed with others.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from meteor import storage
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.errors import CheckpointError, DamagedError, DataError, NotFoundError


class MetricsSegment:
    """Metrics of one group of workers. Each write replaces the whole segment, as object stores cannot append.

    Args:
        run_uri: the stage's folder.
        attempt: number of the group's claim.
        start_step: number of steps before the group's first one.
        before: list of the segments that lead to this step, from the checkpoint that the group resumes.
    """

    def __init__(
        self, run_uri: str, *, attempt: int, start_step: int = 0, before: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._name = f"{attempt:04d}_from_{start_step:08d}.jsonl"
        self._uri = storage.join(run_uri, "metrics", self._name)
        self._before = list(before)
        self._lines: list[bytes] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store more rows, one per step."""
        self._lines += [json.dumps(row).encode() + b"\n" for row in rows]
        storage.write_bytes(self._uri, b"".join(self._lines))

    def listed(self) -> list[dict[str, Any]]:
        """Return the list of all segments that lead to the last row, for a checkpoint's state."""
        if not self._lines:
            return [dict(entry) for entry in self._before]
        crc32 = f"{zlib.crc32(b''.join(self._lines)):08x}"
        return [*map(dict, self._before), {"file": self._name, "num_rows": len(self._lines), "crc32": crc32}]


def read_listed(run_uri: str, listed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read the rows of listed segments, in order.

    Raises:
        DamagedError: rows are missing, or are not those that were written.
    """
    rows: list[dict[str, Any]] = []
    for entry in listed:
        uri = storage.join_below(storage.join(run_uri, "metrics"), entry["file"])
        try:
            lines = storage.read_bytes(uri).splitlines(keepends=True)[: entry["num_rows"]]
        except NotFoundError as error:
            raise DamagedError(
                f"{uri} is missing: the metrics of this stage are incomplete; restore the file"
            ) from error
        if f"{zlib.crc32(b''.join(lines)):08x}" != entry["crc32"]:
            raise DamagedError(
                f"{uri} is damaged: its first {entry['num_rows']} rows do not match their checksum; restore the file"
            )
        rows += map(json.loads, lines)
    return rows


def read_running(run_uri: str) -> list[dict[str, Any]]:
    """Read the rows of a stage that has not finished: those that lead to its last checkpoint, and those after it.

    Raises:
        DamagedError: rows before the last checkpoint are not those that were written.
        DataError: a later line is not JSON.
    """
    rows = read_listed(run_uri, _last_listed(run_uri))
    last_step = rows[-1]["step"] if rows else 0
    return rows + [row for row in _read_newest(run_uri) if row["step"] > last_step]


def read_last(run_uri: str) -> dict[str, Any] | None:
    """Return the newest row, for progress lines; None before the first row."""
    rows = _read_newest(run_uri)
    return rows[-1] if rows else None


def _last_listed(run_uri: str) -> list[dict[str, Any]]:
    for uri in reversed(complete_checkpoints(storage.join(run_uri, "checkpoints"))):
        try:
            return Checkpoint(uri).state["metrics"]
        # The next start passes over a damaged checkpoint too.
        except CheckpointError:
            continue
    return []


def _read_newest(run_uri: str) -> list[dict[str, Any]]:
    segments = storage.list_objects(storage.join(run_uri, "metrics"))
    if not segments:
        return []
    uri = segments[-1].uri
    try:
        # Text after the last newline is an unfinished row: the process died while it wrote.
        lines = storage.read_bytes(uri).split(b"\n")[:-1]
    except NotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{uri}, line {number} is no row of JSON ({error}): {line[:80]!r}; remove the line"
            ) from error
    return rows
