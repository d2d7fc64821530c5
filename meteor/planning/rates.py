"""Rates of encoding, training and answering: given, measured by finished stages, or assumed from a GPU's peak."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meteor import storage
from meteor.config import RunSettings
from meteor.errors import MeteorError, SettingsError
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, CacheCost
from meteor.planning.survey import count_llm_parameters
from meteor.stages import TrainingStage
from meteor.train.flops import PEAK_TFLOPS


@dataclass(frozen=True)
class Rate:
    """Speed of one GPU, or of one worker on the CPU.

    Attributes:
        per_s: sub-images, FLOPs or questions per second.
        source: where the number comes from, for the reader.
    """

    per_s: float
    source: str


@dataclass(frozen=True)
class RateOptions:
    """What the user knows about rates.

    Attributes:
        gpu: key of `PEAK_TFLOPS`; None assumes no rate for workers on the CPU, and an H100 for GPUs.
        mfu: share of the GPU's peak that training reaches, 0 to 1.
        sub_images_per_s: that one GPU encodes; None if not known.
        questions_per_s: that one GPU answers; None if not known.
        measured: root of finished runs; None for the run's own output.
    """

    gpu: str | None = None
    mfu: float = 0.4
    sub_images_per_s: float | None = None
    questions_per_s: float | None = None
    measured: str | None = None


@dataclass(frozen=True)
class _Finished:
    settings: RunSettings
    stage: str
    counts: dict[str, Any]
    extra: dict[str, Any]


class Rates:
    """Rates for the stages of a study.

    Args:
        settings: the study's run; stages on the same kind of hardware (GPUs or CPUs) are taken as measurements.
        options: what the user knows.
    """

    def __init__(self, settings: RunSettings, options: RateOptions) -> None:
        self._options = options
        self._on_gpus = settings.runtime.gpus_per_worker > 0
        root = options.measured or settings.output
        # The rate of a CPU says nothing about a GPU.
        self._finished = [
            one for one in _finished_stages(root) if (one.settings.runtime.gpus_per_worker > 0) == self._on_gpus
        ]

    def encoding(self, caches: Sequence[CacheCost]) -> Rate | None:
        """Sub-images per second; None if nobody knows."""
        if self._options.sub_images_per_s:
            return Rate(self._options.sub_images_per_s, "given")
        done = [
            (one.counts["sub_images_encoded"], one.counts["encoding_seconds"] * one.settings.runtime.num_encoders)
            for one in self._of_stage("cache_features")
            if one.counts.get("sub_images_encoded")
        ]
        num_sub_images = sum(cache.num_sub_images for cache in caches)
        measured = weighted_rate(done, _measured_by(done))
        if measured or not num_sub_images:
            return measured
        return self._assumed(sum(cache.encoder_flops for cache in caches) / num_sub_images)

    def training(self, stage: TrainingStage) -> Rate | None:
        """FLOPs per second; None if nobody knows."""
        done = []
        for one in self._of_stage(stage):
            options, totals = one.settings.training(stage), one.extra["totals"]
            tokens = (totals["visual_tokens"] + totals["text_tokens"]) * options.epochs
            try:
                flops = FLOPS_PER_PARAMETER[stage] * count_llm_parameters(one.settings.llm.path) * tokens
            except SettingsError:
                continue  # its language model is gone
            done.append((flops, one.extra["training_seconds"] * one.settings.runtime.num_workers))
        return weighted_rate(done, _measured_by(done)) or self._assumed(1)

    def answering(self) -> Rate | None:
        """Questions per second; None if nobody knows."""
        if self._options.questions_per_s:
            return Rate(self._options.questions_per_s, "given")
        done = [
            (
                one.counts["answered_now"],
                one.counts["answered_now"] / one.counts["questions_per_s"] * one.settings.runtime.num_evaluators,
            )
            for one in self._of_stage("evaluate")
            if one.counts.get("answered_now")
        ]
        return weighted_rate(done, f"{_measured_by(done)}, their start included")

    def _of_stage(self, stage: str) -> list[_Finished]:
        return [one for one in self._finished if one.stage == stage]

    def _assumed(self, flops_per_item: float) -> Rate | None:
        gpu = self._options.gpu or ("H100" if self._on_gpus else None)
        if gpu is None:
            return None
        flops_per_s = self._options.mfu * PEAK_TFLOPS[gpu] * 1e12
        return Rate(flops_per_s / flops_per_item, f"assumed: {self._options.mfu:.0%} of {gpu}'s peak")


def weighted_rate(done: Sequence[tuple[float, float]], source: str) -> Rate | None:
    """The rate over several measurements, given as (amount, GPU seconds); None if there are none."""
    seconds = sum(spent for _, spent in done)
    return Rate(sum(amount for amount, _ in done) / seconds, source) if seconds else None


def _measured_by(done: Sequence[Any]) -> str:
    return f"measured by {len(done)} finished stage{'s' if len(done) != 1 else ''}"


def _finished_stages(root: str) -> Iterator[_Finished]:
    """The stages that have finished below an output folder; those of other releases are passed over."""
    for info in storage.list_objects(storage.join(root, "runs")):
        folder, _, name = info.uri.rpartition("/")
        if name == "summary.json":
            try:
                settings = RunSettings.model_validate(storage.read_json(storage.join(folder, "run.json"))["settings"])
                summary = storage.read_json(info.uri)
                yield _Finished(settings, summary["stage"], summary["counts"], summary["extra"])
            except (MeteorError, ValueError, KeyError):
                continue
