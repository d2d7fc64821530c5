"""Counts and rates of an encoding pass, for its log lines and its summary."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Shortest time for a rate: batches of several calls arrive together, so that the time between two batches says nothing.
_MIN_STEADY_S = 5.0


@dataclass(frozen=True)
class _Counts:
    at_s: float
    num_images: int = 0
    num_sub_images: int = 0
    payload_bytes: int = 0
    device_s: float = 0.0


class EncodingMeter:
    """Sum of outcomes as they arrive, and their rates.

    Rates count from the first batch on, as processes start and models load before it. If a pass is too short for that, they
    count from its start.

    Args:
        num_encoders: number of actors that share the work.
        clock: function that returns a time in seconds, which never decreases.
    """

    def __init__(self, num_encoders: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._num_encoders, self._clock = num_encoders, clock
        self._start = self._now = _Counts(clock())
        self._first: _Counts | None = None
        self.num_bad = 0

    @property
    def num_images(self) -> int:
        """Number of processed images, bad images included."""
        return self._now.num_images

    def add(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Add the outcomes of a batch (`pipelines.ray_parts.encoder.OUTCOME_SCHEMA`)."""
        now = self._now
        self.num_bad += sum(bool(row["reason"]) for row in outcomes)
        self._now = _Counts(
            at_s=self._clock(),
            num_images=now.num_images + len(outcomes),
            num_sub_images=now.num_sub_images + sum(row["num_sub_images"] for row in outcomes),
            payload_bytes=now.payload_bytes + sum(row["payload_bytes"] for row in outcomes),
            device_s=now.device_s + sum(row["device_s"] for row in outcomes),
        )
        self._first = self._first or self._now

    def counts(self) -> dict[str, float]:
        """Return numbers for a stage's summary: seconds and totals from the start, rates from the first batch on."""
        since = self._steady_since()
        seconds = self._now.at_s - since.at_s
        rates = {
            "images_per_s": (self._now.num_images - since.num_images) / seconds,
            "sub_images_per_s": (self._now.num_sub_images - since.num_sub_images) / seconds,
            "megabytes_per_s": (self._now.payload_bytes - since.payload_bytes) / seconds / 1e6,
            # The time of a batch counts when the batch is written. With few batches, the sum may exceed the time that passed.
            "encoder_busy_share": min(1.0, (self._now.device_s - since.device_s) / seconds / self._num_encoders),
        }
        return {
            "sub_images_encoded": self._now.num_sub_images,
            "bytes_written": self._now.payload_bytes,
            "encoding_seconds": self._now.at_s - self._start.at_s,
            **{name: round(value, 4) for name, value in rates.items()},
        }

    def detail(self) -> str:
        """Return the end of a progress line."""
        if self._first is None:
            return ", encoders starting"
        counts = self.counts()
        bad = f", {self.num_bad} bad" if self.num_bad else ""
        return (
            f"; now {counts['images_per_s']:.1f} images/s, {counts['sub_images_per_s']:.1f} sub-images/s, "
            f"encoders {counts['encoder_busy_share']:.0%} busy, {counts['bytes_written'] / 1e6:,.0f} MB written, "
            f"{counts['megabytes_per_s']:.1f} MB/s{bad}"
        )

    def _steady_since(self) -> _Counts:
        """Return the state after the first batch; the state at the start if the time since then is too short for a rate."""
        if self._first is None or self._now.at_s - self._first.at_s < _MIN_STEADY_S:
            return replace(self._start, at_s=min(self._start.at_s, self._now.at_s - 1e-9))
        return self._first
