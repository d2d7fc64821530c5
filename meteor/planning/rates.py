"""Rates of encoding, training and answering: given by the user, measured by finished stages, or assumed from a GPU's peak."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meteor import storage
from meteor.checksums import read_checked_json
from meteor.config import RunSettings
from meteor.errors import MeteorError, SettingsError
from meteor.formatting import format_amount
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
    """The user's knowledge of rates.

    Attributes:
        gpu: key of `PEAK_TFLOPS`; None assumes an H100 for workers with GPUs, and no rate for workers on the CPU.
        mfu: share of the GPU's peak that training reaches, 0 to 1.
        sub_images_per_s: sub-images that one GPU encodes per second; None if not known.
        questions_per_s: questions that one GPU answers per second; None if not known.
        measured: output folder whose finished runs are measurements; None for the run's own output.
    """

    gpu: str | None = None
    mfu: float = 0.4
    sub_images_per_s: float | None = None
    questions_per_s: float | None = None
    measured: str | None = None


@dataclass(frozen=True)
class _FinishedStage:
    settings: RunSettings
    stage: str
    counts: dict[str, Any]
    extra: dict[str, Any]


class Rates:
    """Rates for the stages of a study.

    Args:
        settings: settings of the study; finished stages on the same kind of hardware (GPUs or CPUs) are measurements.
        options: the user's knowledge of rates.
    """

    def __init__(self, settings: RunSettings, options: RateOptions) -> None:
        self._options = options
        self._on_gpus = settings.runtime.gpus_per_worker > 0
        root = options.measured or settings.output
        # The rate of a CPU says nothing about a GPU.
        self._finished = [
            stage for stage in _finished_stages(root) if (stage.settings.runtime.gpus_per_worker > 0) == self._on_gpus
        ]

    def encoding(self, caches: Sequence[CacheCost]) -> Rate | None:
        """Return sub-images per second; None if not known."""
        if self._options.sub_images_per_s:
            return Rate(self._options.sub_images_per_s, "given")
        measurements = [
            (done.counts["sub_images_encoded"], done.counts["encoding_seconds"] * done.settings.runtime.num_encoders)
            for done in self._finished_as("cache_features")
            if done.counts.get("sub_images_encoded")
        ]
        num_sub_images = sum(cache.num_sub_images for cache in caches)
        measured = weighted_rate(measurements, _measured_by(measurements))
        if measured or not num_sub_images:
            return measured
        return self._assumed(sum(cache.encoder_flops for cache in caches) / num_sub_images)

    def training(self, stage: TrainingStage) -> Rate | None:
        """Return FLOPs per second; None if not known."""
        measurements = []
        for done in self._finished_as(stage):
            options, totals = done.settings.training(stage), done.extra["totals"]
            tokens = (totals["visual_tokens"] + totals["text_tokens"]) * options.epochs
            try:
                flops = FLOPS_PER_PARAMETER[stage] * count_llm_parameters(done.settings.llm.path) * tokens
            except SettingsError:
                continue  # the language model is no longer there
            measurements.append((flops, done.extra["training_seconds"] * done.settings.runtime.num_workers))
        return weighted_rate(measurements, _measured_by(measurements)) or self._assumed(1)

    def answering(self) -> Rate | None:
        """Return questions per second; None if not known."""
        if self._options.questions_per_s:
            return Rate(self._options.questions_per_s, "given")
        measurements = [
            (
                done.counts["answered_now"],
                done.counts["answered_now"] / done.counts["questions_per_s"] * done.settings.runtime.num_evaluators,
            )
            for done in self._finished_as("evaluate")
            if done.counts.get("answered_now")
        ]
        return weighted_rate(measurements, f"{_measured_by(measurements)}, their start included")

    def _finished_as(self, stage: str) -> list[_FinishedStage]:
        return [done for done in self._finished if done.stage == stage]

    def _assumed(self, flops_per_item: float) -> Rate | None:
        gpu = self._options.gpu or ("H100" if self._on_gpus else None)
        if gpu is None:
            return None
        flops_per_s = self._options.mfu * PEAK_TFLOPS[gpu] * 1e12
        return Rate(flops_per_s / flops_per_item, f"assumed: {self._options.mfu:.0%} of {gpu}'s peak")


def weighted_rate(measurements: Sequence[tuple[float, float]], source: str) -> Rate | None:
    """Return the rate over several measurements of (amount, GPU seconds); None if there are none."""
    seconds = sum(spent for _, spent in measurements)
    return Rate(sum(amount for amount, _ in measurements) / seconds, source) if seconds else None


def _measured_by(measurements: Sequence[Any]) -> str:
    return f"measured by {format_amount(len(measurements), 'finished stage')}"


def _finished_stages(root: str) -> Iterator[_FinishedStage]:
    """Yield the finished stages below an output folder, without those whose files another release wrote."""
    for info in storage.list_objects(storage.join(root, "runs")):
        folder, _, name = info.uri.rpartition("/")
        if name == "summary.json":
            try:
                started = read_checked_json(storage.join(folder, "run.json"))
                settings, summary = RunSettings.model_validate(started["settings"]), read_checked_json(info.uri)
                yield _FinishedStage(settings, summary["stage"], summary["counts"], summary["extra"])
            except (MeteorError, ValueError, KeyError):
                continue
