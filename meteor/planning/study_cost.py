"""What a study takes, by arithmetic: GPU hours of each stage at given or measured rates, bytes, and what the cache avoids."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meteor.formatting import format_bytes, format_count, format_share

_SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Rate:
    """How fast one GPU is.

    Attributes:
        per_s: sub-images, FLOPs or questions a second.
        source: where that comes from, for the reader.
    """

    per_s: float
    source: str


@dataclass(frozen=True)
class Work:
    """A stage of all runs of a study, what several runs share counted once.

    Attributes:
        stage: its name.
        num_runs: how often it is run.
        amount: sub-images, model FLOPs, or questions of all of them.
        unit: what the amount counts.
        rate: of one GPU; None where nobody knows it.
    """

    stage: str
    num_runs: int
    amount: float
    unit: str
    rate: Rate | None

    @property
    def gpu_hours(self) -> float | None:
        """None where the rate is not known."""
        return self.amount / self.rate.per_s / _SECONDS_AN_HOUR if self.rate else None


@dataclass(frozen=True)
class StudyCost:
    """Cost of a study, or of a single run.

    Attributes:
        name: of the run file's run.
        num_variants: runs, seeds counted.
        work: one entry a stage, in order.
        cache_bytes: codec -> bytes of the features that variants read.
        checkpoint_bytes: kept checkpoints and results of all distinct training stages.
        avoided_sub_images: sub-images that training would encode in its steps without a cache, less those encoded once.
        encoder_rate: sub-images a second of one GPU; None where not known.
        num_gpus: that work at the same time, for the hours on the clock.
        notes: what is missing in this plan.
    """

    name: str
    num_variants: int
    work: tuple[Work, ...]
    cache_bytes: Mapping[str, int]
    checkpoint_bytes: int
    avoided_sub_images: float
    encoder_rate: Rate | None
    num_gpus: int
    notes: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        """Of the stages whose rate is known."""
        return sum(one.gpu_hours or 0.0 for one in self.work)

    @property
    def avoided_gpu_hours(self) -> float | None:
        """Of encoding; negative where one run shows few of the images, None where the encoder's rate is not known."""
        return self.avoided_sub_images / self.encoder_rate.per_s / _SECONDS_AN_HOUR if self.encoder_rate else None

    def to_dict(self, *, usd_per_gb: float, usd_per_gpu_hour: float | None) -> dict[str, Any]:
        """All of it as JSON values."""
        total_bytes = sum(self.cache_bytes.values()) + self.checkpoint_bytes
        return asdict(self) | {
            "work": [{**asdict(one), "gpu_hours": one.gpu_hours} for one in self.work],
            "gpu_hours": self.gpu_hours,
            "avoided_gpu_hours": self.avoided_gpu_hours,
            "usd": None if usd_per_gpu_hour is None else self.gpu_hours * usd_per_gpu_hour,
            "usd_per_month": total_bytes / 1e9 * usd_per_gb,
        }

    def to_text(self, *, usd_per_gb: float, usd_per_gpu_hour: float | None) -> str:
        """The plan as aligned lines.

        Args:
            usd_per_gb: price of a month's storage of a decimal gigabyte.
            usd_per_gpu_hour: price of an hour of one GPU; None leaves money out.
        """
        rows = [("stage", "runs", "work", "GPU hours", "at")]
        for one in self.work:
            hours = "?" if one.gpu_hours is None else _hours(one.gpu_hours)
            at = f"{_amount(one.rate.per_s, one.unit)}/s a GPU, {one.rate.source}" if one.rate else "no rate known"
            rows.append((one.stage, str(one.num_runs), _amount(one.amount, one.unit), hours, at))
        price = "" if usd_per_gpu_hour is None else f", {self.gpu_hours * usd_per_gpu_hour:,.0f} USD"
        clock = f"{_hours(self.gpu_hours / self.num_gpus)} hours on {self.num_gpus} GPUs{price}"
        rows.append(("all", "", "", _hours(self.gpu_hours), clock))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{self.name}: {self.num_variants} runs"]
        lines += [
            "  "
            + "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:4], widths, strict=True)), row[4]]).rstrip()
            for row in rows
        ]
        facts = [
            (f"cache, {codec}", f"{format_bytes(size)}, {size / 1e9 * usd_per_gb:,.2f} USD a month")
            for codec, size in self.cache_bytes.items()
        ]
        size = self.checkpoint_bytes
        facts.append(
            ("checkpoints", f"{format_bytes(size)} with results, {size / 1e9 * usd_per_gb:,.2f} USD a month if kept")
        )
        facts.append(("the cache avoids", self._avoids()))
        facts += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in facts)
        return "\n".join([*lines, "", *(f"  {name:<{width}}  {text}" for name, text in facts)])

    def _avoids(self) -> str:
        text = f"encoding {format_count(round(self.avoided_sub_images))} sub-images in the steps"
        if self.avoided_sub_images < 0:
            text = "nothing yet: the runs show fewer sub-images than the cache holds"
        if self.avoided_gpu_hours is None:
            return text
        share = self.avoided_gpu_hours / max(self.avoided_gpu_hours + self.gpu_hours, 1e-12)
        return f"{text}: {_hours(self.avoided_gpu_hours)} GPU hours, {format_share(share)} of what there would be without it"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if abs(hours) >= 10 else f"{hours:,.3g}"


def _amount(amount: float, unit: str) -> str:
    if unit != "FLOP":
        return f"{amount:,.4g} {unit}" if amount < 100 else f"{format_count(round(amount))} {unit}"
    for name, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if amount >= size:
            return f"{amount / size:,.3g} {name}"
    return f"{amount:,.0f} FLOP"


def weighted_rate(done: Sequence[tuple[float, float]], source: str) -> Rate | None:
    """The rate of what was measured: amounts and GPU seconds of runs; None where there are none."""
    seconds = sum(spent for _, spent in done)
    return Rate(sum(amount for amount, _ in done) / seconds, source) if seconds else None
