"""Metrics that Ray exports to Prometheus while a stage runs: counters of work, whose rates are speeds, and gauges.

A process that starts again begins its counters at 0, as Prometheus expects. infra/observability has the dashboard.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

_TAGS = ("variant", "stage", "run")
# Name -> description. Ray adds "ray_" before each name, and "_total" after the name of a counter.
COUNTERS = {
    "meteor_images_encoded": "images that the encoder has processed, bad images included",
    "meteor_sub_images_encoded": "sub-images encoded",
    "meteor_feature_bytes": "bytes of features written",
    "meteor_encoder_seconds": "seconds in which encoding kept the devices busy, summed over encoders",
    "meteor_images_quarantined": "images refused, by `reason`",
    "meteor_questions_answered": "questions answered",
    "meteor_samples": "samples trained on",
    "meteor_visual_tokens": "visual tokens trained on",
    "meteor_text_tokens": "text tokens trained on",
    "meteor_step_seconds": "seconds in steps, the wait for their batches included",
    "meteor_loader_wait_seconds": "seconds in which the worker that waited longest waited for its batches",
}
GAUGES = {
    "meteor_step": "steps done",
    "meteor_steps": "steps in all",
    "meteor_loss": "loss of the last step, nats per token",
    "meteor_mfu": "model FLOPs utilisation of the last step, share of the peak",
    "meteor_memory_gb": "memory of the worker that uses most, GB",
}
_OF_STEP = {
    "meteor_samples": "num_samples",
    "meteor_visual_tokens": "num_visual_tokens",
    "meteor_text_tokens": "num_text_tokens",
    "meteor_step_seconds": "seconds",
    "meteor_loader_wait_seconds": "loader_wait_s",
    "meteor_step": "step",
    "meteor_steps": "num_steps",
    "meteor_loss": "loss",
    "meteor_mfu": "mfu",
    "meteor_memory_gb": "memory_gb",
}


class LiveMetrics:
    """Metrics of one stage, set in the process that does the work; Ray's agent on the node exports them.

    Args:
        variant: name of the run.
        stage: name of the stage.
        run: digest of the stage; 12 digits of it, as in the folder's name, become a tag.
    """

    def __init__(self, variant: str, stage: str, run: str) -> None:
        self._tags = {"variant": variant, "stage": stage, "run": run[:12]}
        self._known: dict[str, Counter | Gauge] = {}

    def encoded(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Count the outcomes of a batch (`pipelines.ray_parts.encoder.OUTCOME_SCHEMA`)."""
        self._add("meteor_images_encoded", len(outcomes))
        self._add("meteor_sub_images_encoded", sum(row["num_sub_images"] for row in outcomes))
        self._add("meteor_feature_bytes", sum(row["payload_bytes"] for row in outcomes))
        self._add("meteor_encoder_seconds", sum(row["device_s"] for row in outcomes))
        self.quarantined([row["reason"] for row in outcomes if row["reason"]])

    def quarantined(self, reasons: Sequence[str]) -> None:
        """Count refused images."""
        for reason in reasons:
            self._add("meteor_images_quarantined", 1, reason=reason)

    def answered(self, num_questions: int) -> None:
        """Count answers."""
        self._add("meteor_questions_answered", num_questions)

    def step(self, row: Mapping[str, Any]) -> None:
        """Export a step's row of metrics."""
        for name, column in _OF_STEP.items():
            value = row.get(column)
            if not isinstance(value, int | float):
                continue
            if name in COUNTERS:
                self._add(name, value)
            else:
                self._metric(name, Gauge, GAUGES).set(value, self._tags)

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:
            self._metric(name, Counter, COUNTERS, tuple(tags)).inc(value, {**self._tags, **tags})

    def _metric(self, name: str, kind: Any, table: Mapping[str, str], tags: tuple[str, ...] = ()) -> Any:
        if name not in self._known:
            self._known[name] = kind(name, description=table[name], tag_keys=(*_TAGS, *tags))
        return self._known[name]
