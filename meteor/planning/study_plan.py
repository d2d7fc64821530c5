"""The plan of a study as values, text and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meteor.formatting import format_amount, format_bytes, format_count, format_share
from meteor.planning.cache_cost import USD_PER_GB
from meteor.planning.rates import Rate
from meteor.stages import STAGES

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StageWork:
    """Work of one stage over all runs of a study.

    Attributes:
        stage: name of the stage.
        num_stages: number of different stages of this name that the runs need.
        num_shared: number of stages that several runs share.
        num_finished: number of stages that have finished.
        amount: sub-images, model FLOPs or questions that are left.
        unit: unit of the amount.
        rate: speed of one GPU or worker; None if not known.
    """

    stage: str
    num_stages: int
    num_shared: int
    num_finished: int
    amount: float
    unit: str
    rate: Rate | None

    @property
    def hours(self) -> float | None:
        """Hours of one GPU or worker; None if the rate is not known."""
        if not self.amount:
            return 0.0
        return self.amount / self.rate.per_s / _SECONDS_PER_HOUR if self.rate else None


@dataclass(frozen=True)
class CacheRow:
    """A feature cache of a study.

    Attributes:
        codec: codec of the features.
        num_images: distinct images that the cache holds when it is full.
        num_missing: images that the cache lacks now.
        num_runs: runs that read the cache.
        size_bytes: size of all payloads when the cache is full.
    """

    codec: str
    num_images: int
    num_missing: int
    num_runs: int
    size_bytes: int


@dataclass(frozen=True)
class StudyPlan:
    """The plan of a study, or of a single run.

    Attributes:
        name: name in the run file.
        work: one entry per stage, in order.
        caches: the caches that the runs read.
        checkpoint_bytes: kept checkpoints and results of all training stages.
        avoided_sub_images: sub-images that training would encode in its steps without a cache, less those encoded once.
        encoder_rate: sub-images per second of one GPU or worker; None if not known.
        num_workers: GPUs or workers that train at the same time.
        worker: "GPU" or "worker".
        states: run -> stage -> "finished", "to do", or "with <the run that does it>".
        parallel: runs at the same time; None for as many as fit the cluster.
        notes: parts that are missing in this plan, and why.
    """

    name: str
    work: tuple[StageWork, ...]
    caches: tuple[CacheRow, ...]
    checkpoint_bytes: int
    avoided_sub_images: float
    encoder_rate: Rate | None
    num_workers: int
    worker: str
    states: Mapping[str, Mapping[str, str]]
    parallel: int | None
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """GPU or worker hours that are left, without stages whose rate is not known."""
        return sum(work.hours or 0.0 for work in self.work)

    @property
    def avoided_hours(self) -> float | None:
        """Hours of encoding that the cache avoids; negative if the runs show few of the images, None if not known."""
        return self.avoided_sub_images / self.encoder_rate.per_s / _SECONDS_PER_HOUR if self.encoder_rate else None

    def to_dict(self, *, usd_per_gb: float = USD_PER_GB, usd_per_gpu_hour: float | None = None) -> dict[str, Any]:
        """Return the plan as JSON values; for the arguments see `to_text`."""
        return asdict(self) | {
            "work": [{**asdict(work), "hours": work.hours} for work in self.work],
            "hours": self.hours,
            "avoided_hours": self.avoided_hours,
            "usd": None if usd_per_gpu_hour is None else self.hours * usd_per_gpu_hour,
            "usd_per_month": self._stored_bytes / 1e9 * usd_per_gb,
        }

    @property
    def _stored_bytes(self) -> int:
        return sum(cache.size_bytes for cache in self.caches) + self.checkpoint_bytes

    def to_text(self, *, usd_per_gb: float = USD_PER_GB, usd_per_gpu_hour: float | None = None) -> str:
        """Return the plan as aligned lines.

        Args:
            usd_per_gb: price of storing a decimal gigabyte for a month.
            usd_per_gpu_hour: price of one GPU for an hour; None omits the price of computing.
        """
        blocks = [
            [f"plan of {self.name}: {format_amount(len(self.states), 'run')}"],
            _aligned([*self._stage_rows(), self._total_row(usd_per_gpu_hour)]),
            _aligned(self._facts(usd_per_gb)),
            _aligned(self._run_rows()),
        ]
        return "\n\n".join("\n".join(block) for block in blocks)

    def _stage_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("stage", "different", "shared", "finished", "left to do", f"{self.worker} hours", "rate")
        ]
        for work in self.work:
            if not work.amount:
                left, hours, rate = "nothing", "0", ""
            else:
                left, hours = _amount(work.amount, work.unit), "?" if work.hours is None else _hours(work.hours)
                rate = "not known before a stage has finished"
                if work.rate:
                    rate = f"{_amount(work.rate.per_s, work.unit)}/s per {self.worker}, {work.rate.source}"
            counts = (work.num_stages, work.num_shared, work.num_finished)
            rows.append((work.stage, *map(str, counts), left, hours, rate))
        return rows

    def _total_row(self, usd_per_gpu_hour: float | None) -> tuple[str, ...]:
        price = "" if usd_per_gpu_hour is None else f", {self.hours * usd_per_gpu_hour:,.0f} USD"
        clock = (
            f"{_hours(self.hours / self.num_workers)} hours on {format_amount(self.num_workers, self.worker)}{price}"
        )
        unknown = "" if all(work.hours is not None for work in self.work) else "at least "
        return ("all", "", "", "", "", _hours(self.hours), f"{unknown}{clock}")

    def _facts(self, usd_per_gb: float) -> list[tuple[str, str]]:
        def month(size_bytes: int) -> str:
            return f"{format_bytes(size_bytes)}, {size_bytes / 1e9 * usd_per_gb:,.2f} USD per month"

        rows = []
        for cache in self.caches:
            missing = f"{format_count(cache.num_missing)} to encode" if cache.num_missing else "nothing to encode"
            held = f"{format_count(cache.num_images)} images, {missing}; read by {format_amount(cache.num_runs, 'run')}"
            rows.append((f"cache, {cache.codec}", f"{held}; {month(cache.size_bytes)}"))
        rows.append(("checkpoints", f"{month(self.checkpoint_bytes)} if all are kept, results included"))
        rows.append(("the cache avoids", self._avoids()))
        if len(self.states) > 1:
            rows.append(("parallel runs", str(self.parallel or "as many as fit the cluster")))
        return rows + [("note", note) for note in self.notes]

    def _run_rows(self) -> list[tuple[str, ...]]:
        stages = [stage for stage in STAGES if any(stage in states for states in self.states.values())]
        return [
            ("run", *stages),
            *((name, *(states.get(stage, "-") for stage in stages)) for name, states in self.states.items()),
        ]

    def _avoids(self) -> str:
        if self.avoided_sub_images < 0:
            return "nothing yet: the runs show fewer sub-images than the cache holds"
        text = f"encoding {format_count(round(self.avoided_sub_images))} sub-images in the steps"
        if self.avoided_hours is None:
            return text
        share = self.avoided_hours / max(self.avoided_hours + self.hours, 1e-12)
        return f"{text}: {_hours(self.avoided_hours)} {self.worker} hours, {format_share(share)} of the total without a cache"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if abs(hours) >= 10 else f"{hours:,.3g}"


def _amount(amount: float, unit: str) -> str:
    if unit != "FLOP":
        return f"{amount:,.4g} {unit}" if amount < 100 else f"{format_count(round(amount))} {unit}"
    for name, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if amount >= size:
            return f"{amount / size:,.3g} {name}"
    return f"{amount:,.0f} FLOP"
