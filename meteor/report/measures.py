"""Numbers that a report derives from metrics: smoothed loss, median rates, totals."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from meteor.report.data import VariantResult
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES

# A curve with fewer rows is readable without smoothing.
_MIN_ROWS_TO_SMOOTH = 20


def column(metrics: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Return the values of a key as (rows,) float64; NaN if a row lacks the key."""
    return np.array([row.get(key, np.nan) for row in metrics], dtype=np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over about a twentieth of the curve around each point, so that the result does not lag; NaN is skipped."""
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
    """Return the median of count / seconds over rows, to which compilation and stalls matter little; None if not recorded."""
    rates = [row[count_key] / row["seconds"] for row in metrics if row.get("seconds") and count_key in row]
    return median(rates) if rates else None


def total(metrics: Sequence[dict[str, Any]], count_key: str) -> int | None:
    """Return the sum of a count over all rows; None if not recorded."""
    counts = [row[count_key] for row in metrics if count_key in row]
    return sum(counts) if counts else None


def step_seconds(run: StageRecord) -> float | None:
    """Return the seconds of all steps, without start-up and checkpoints; a resumed stage counts completely."""
    seconds = [row["seconds"] for row in run.metrics if "seconds" in row]
    return sum(seconds) if seconds else None


def final_loss(run: StageRecord) -> float | None:
    """Return the smoothed loss at the last step; None if no step was reported."""
    losses = column(run.metrics, "loss")
    return float(smooth(losses)[-1]) if len(losses) else None


def training_seconds(variant: VariantResult) -> dict[str, float]:
    """Return stage -> seconds of all steps, for training stages that have finished."""
    runs = {stage: variant.stages[stage] for stage in TRAINING_STAGES if stage in variant.stages}
    seconds = {stage: step_seconds(run) for stage, run in runs.items() if run.finished}
    return {stage: found for stage, found in seconds.items() if found is not None}
