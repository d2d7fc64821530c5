"""Definition of "the same stage": stages, plans, studies, jobs, the report and MLflow all call `identify`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from meteor.config import RunSettings, mathematical_settings, settings_digest
from meteor.stages import STAGES, TRAINING_STAGES, Stage, TrainingStage


@dataclass(frozen=True)
class Versions:
    """Versions of the published data that a training stage reads.

    Attributes:
        index_version: version of the dataset index.
        index_digest: digest of the stage's images in that version (`DatasetIndex.digest`).
        cache_version: version of the feature cache.
    """

    index_version: int
    index_digest: str
    cache_version: int


class Facts(Protocol):
    """Settings of a run, and the content behind the names in them.

    `meteor.assembly.Inputs` reads the files. `NamesAlone` lets each name stand for its content, for machines that cannot read
    the files, such as the one that submits a job.
    """

    settings: RunSettings

    def all_samples(self) -> Any:
        """Return digests of all sample sets of the run, question sets included."""

    def training_samples(self, stage: TrainingStage) -> Any:
        """Return a digest of the samples that a stage trains on, with their weights."""

    def questions(self) -> Mapping[str, Any]:
        """Return question set -> digest of its questions and of how they are scored."""

    def cache_key(self) -> Any:
        """Return the key of the feature cache."""

    def llm(self) -> Any:
        """Return a fingerprint of the language model."""

    def projector(self) -> Any:
        """Return the digest of the stage-1 projector that the settings name."""

    def model(self) -> Any:
        """Return a digest of the finished model that the settings name."""

    def choose_versions(self, stage: TrainingStage, content: Mapping[str, Any]) -> Versions | None:
        """Choose versions of index and cache for a stage with this content; None before cache_features has run."""

    def question_images(self) -> Mapping[str, Any] | None:
        """Return question set -> digest of its images; None before cache_features has run."""


@dataclass(frozen=True)
class StageIdentity:
    """Everything that decides about a stage's numbers. Two stages with equal digests are the same stage.

    Attributes:
        stage: name of the stage.
        content: mathematical settings and digests of files, images and the previous stage, as JSON values.
        versions: versions that a training stage reads; None for other stages, and before cache_features has run.
    """

    stage: Stage
    content: Mapping[str, Any]
    versions: Versions | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 of the content, 64 hexadecimal digits."""
        return settings_digest({"stage": self.stage, **self.content})

    @property
    def name(self) -> str:
        """Name of the stage's folder: ``<stage>-<first 12 digits of the digest>``."""
        return f"{self.stage}-{self.digest[:12]}"


def stages_of(settings: RunSettings) -> tuple[Stage, ...]:
    """Return the stages that a run goes through, in order."""
    left_out = left_out_stages(settings)
    return tuple(stage for stage in STAGES if stage not in left_out)


def left_out_stages(settings: RunSettings) -> dict[Stage, str]:
    """Return the stages that a run does not go through, each with the reason."""
    data, reasons = settings.data, dict[Stage, str]()
    if settings.evaluate.model:
        reasons |= dict.fromkeys(TRAINING_STAGES, "evaluate.model names a finished model")
    if settings.finetune.pretrained:
        reasons.setdefault("pretrain", "finetune.pretrained names a projector")
    for stage in TRAINING_STAGES:
        if not data.sources(stage):
            reasons.setdefault(stage, f"data.{stage} names no samples")
    if not data.evaluate:
        reasons["evaluate"] = "data.evaluate names no question set"
    elif "finetune" in reasons and not settings.evaluate.model:
        reasons["evaluate"] = "no stage trains a model, and evaluate.model names none"
    return reasons


def describe_left_out(settings: RunSettings) -> list[str]:
    """Say which stages a run does not go through, and why, in a line each."""
    return [f"{stage} does not run: {reason}" for stage, reason in left_out_stages(settings).items()]


def identify(facts: Facts, stage: Stage) -> StageIdentity:
    """Return the identity of one stage of a run.

    Args:
        facts: settings of the run, and the content behind the names in them.
        stage: name of the stage.

    Raises:
        SettingsError: the run lacks settings that the stage needs, for example its samples.
    """
    if stage == "cache_features":
        return StageIdentity(stage, {"samples": facts.all_samples(), **_features(facts)})
    if stage == "evaluate":
        return _identify_evaluation(facts)
    return _identify_training(facts, stage)


def identify_all(facts: Facts) -> dict[Stage, StageIdentity]:
    """Return the identities of all stages that a run goes through, in order."""
    return {stage: identify(facts, stage) for stage in stages_of(facts.settings)}


def _identify_training(facts: Facts, stage: TrainingStage) -> StageIdentity:
    settings = facts.settings
    content = {
        "samples": facts.training_samples(stage),
        **_features(facts),
        "data": mathematical_settings(settings.data),
        "projector": mathematical_settings(settings.projector),
        "llm": {**mathematical_settings(settings.llm), "fingerprint": facts.llm()},
        "settings": mathematical_settings(settings.training(stage)),
        "parent": _parent(facts) if stage == "finetune" else None,
    }
    versions = facts.choose_versions(stage, content)
    return StageIdentity(stage, {**content, "images": versions and versions.index_digest}, versions)


def _parent(facts: Facts) -> Any:
    """Return the digest of the projector that stage 2 starts from; None if the run trains no projector first."""
    if facts.settings.finetune.pretrained:
        return facts.projector()
    if facts.settings.data.sources("pretrain"):
        return identify(facts, "pretrain").digest
    return None


def _identify_evaluation(facts: Facts) -> StageIdentity:
    settings = facts.settings
    content = {
        "model": facts.model() if settings.evaluate.model else identify(facts, "finetune").digest,
        "evaluate": mathematical_settings(settings.evaluate),
        "dtype": settings.llm.dtype,
        "data": mathematical_settings(settings.data),
        **_features(facts),
        "questions": facts.questions(),
        "images": facts.question_images(),
    }
    return StageIdentity("evaluate", content)


def _features(facts: Facts) -> dict[str, Any]:
    return {"cache": facts.cache_key(), "codec": facts.settings.cache.codec}


class NamesAlone:
    """Facts without reading a file: each path stands for its content.

    Stages with the same names have the same content as long as files do not change. The reverse does not hold: a copy of a file
    has another name.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    def all_samples(self) -> Any:
        data = self.settings.data
        return [data.pretrain, data.finetune, data.held_out, self.questions()]

    def training_samples(self, stage: TrainingStage) -> Any:
        return self.settings.data.sources(stage)

    def questions(self) -> Mapping[str, Any]:
        evaluate = self.settings.evaluate
        # Both may resize the images, which are then other images to encode.
        protocol = {"preset": evaluate.preset, "long_side": evaluate.long_side}
        return {
            name: {**questions.model_dump(mode="json"), **protocol}
            for name, questions in self.settings.data.evaluate.items()
        }

    def cache_key(self) -> Any:
        vision = self.settings.vision
        return [{**mathematical_settings(vision), "path": vision.path}, mathematical_settings(self.settings.slicing)]

    def llm(self) -> Any:
        return self.settings.llm.path

    def projector(self) -> Any:
        return self.settings.finetune.pretrained

    def model(self) -> Any:
        return self.settings.evaluate.model

    def choose_versions(self, stage: TrainingStage, content: Mapping[str, Any]) -> Versions | None:
        return None

    def question_images(self) -> Mapping[str, Any] | None:
        return None
