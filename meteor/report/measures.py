"""Numbers a report derives from metrics rows: smoothed loss, median rates, totals."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from meteor.report.data import VariantResult
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES

# Below this a curve is short enough to be read raw.
_MIN_ROWS_TO_SMOOTH = 20


def column(metrics: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """One key of all rows as float64; NaN where a row lacks it."""
    return np.array([row.get(key, np.nan) for row in metrics], dtype=np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over about a twentieth of the curve around each point (so it does not lag); NaN is skipped."""
    if len(values) < _MIN_ROWS_TO_SMOOTH:
        return values
    half_window = min(max(len(values) // 40, 1), 100)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.maximum(np.arange(len(values)) - half_window, 0)
    high = np.minimum(np.arange(len(values)) + half_window + 1, len(values))
    num_finite = counts[high] - counts[low]
    return np.where(num_finite > 0, (sums[high] - sums[low]) / np.maximum(num_finite, 1), np.nan)


def median_rate(metrics: Sequence[dict[str, Any]], count_key: str) -> float | None:
    """Median over rows of count / seconds, so that compilation and stalls do not count; None if never recorded."""
    rates = [row[count_key] / row["seconds"] for row in metrics if row.get("seconds") and count_key in row]
    return median(rates) if rates else None


def total(metrics: Sequence[dict[str, Any]], count_key: str) -> int | None:
    counts = [row[count_key] for row in metrics if count_key in row]
    return sum(counts) if counts else None


def step_seconds(run: StageRecord) -> float | None:
    """Sum over the steps, so that a resumed run counts whole; start-up and checkpoints are not in it."""
    seconds = [row["seconds"] for row in run.metrics if "seconds" in row]
    return sum(seconds) if seconds else None


def final_loss(run: StageRecord) -> float | None:
    """The smoothed loss at the last step; None if no step was reported."""
    losses = column(run.metrics, "loss")
    return float(smooth(losses)[-1]) if len(losses) else None


def training_seconds(variant: VariantResult) -> dict[str, float]:
    """Stage -> seconds of its steps, for the training stages that finished."""
    runs = {stage: variant.stages[stage] for stage in TRAINING_STAGES if stage in variant.stages}
    seconds = {stage: step_seconds(run) for stage, run in runs.items() if run.finished}
    return {stage: found for stage, found in seconds.items() if found is not None}
