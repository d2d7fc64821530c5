"""Metrics of a training stage on their way from a worker: to the stage's folder, to the controller, to Prometheus."""

import time
from typing import Any

import ray.train

from meteor.checkpoint.format import Checkpoint
from meteor.runs.claim import Claim
from meteor.runs.metrics import MetricsSegment
from meteor.train.protocol import on_first_worker
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.logs import lines_are_about


class Reporter:
    """Reporter of metrics: each step's row goes to the stage's folder, then to the controller, which sends it to MLflow.

    Args:
        live: metrics for Prometheus, set by the first worker.
        run_uri: the stage's folder.
        claim: claim of this group of workers on the folder.
        resumed: checkpoint from which the group goes on; None at the beginning.
        rank: rank of this worker.
    """

    def __init__(self, live: LiveMetrics, run_uri: str, claim: Claim, resumed: Checkpoint | None, rank: int) -> None:
        self._live, self._claim, self._rank = live, claim, rank
        state: dict[str, Any] = resumed.state if resumed else {"step": 0, "metrics": []}
        self._segment = MetricsSegment(run_uri, attempt=claim.number, start_step=state["step"], before=state["metrics"])
        self._unstored: list[dict[str, Any]] = []
        self._unreported: list[dict[str, Any]] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self._unstored.append({**row, "time_ms": int(time.time() * 1000)})
        lines_are_about(step=row["step"])
        if self._rank == 0:  # a row covers all workers, so that one worker exports it
            self._live.step(row)

    def store(self) -> dict[str, Any]:
        """Write pending rows to the stage's folder; return the list of segments for a checkpoint's manifest.

        Raises:
            SupersededError: a newer start has taken over; on all workers.
        """
        on_first_worker(self._claim.check)
        self.write()
        return {"metrics": self._segment.listed()}

    def write(self) -> None:
        """Write pending rows to the stage's folder."""
        if self._rank == 0 and self._unstored:
            self._segment.add(self._unstored)
        self._unreported += self._unstored
        self._unstored = []

    def meet(self) -> bool:
        """Store and report pending rows, on all workers after the same step; return whether a machine is about to stop.

        Raises:
            SupersededError: a newer start has taken over; on all workers.
        """
        self.store()
        ray.train.report({"rows": self._unreported})
        self._unreported = []
        return ray.train.get_preemption_info() is not None
