"""Definition of "the same stage": stages, plans, studies, jobs, the report and MLflow all call `identify`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from meteor.config import RunSettings, mathematical_settings, settings_digest
from meteor.stages import Stage, TrainingStage


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
    """Content behind the names in a run's settings.

    `meteor.assembly.Inputs` reads the files. `NamesAlone` lets each name stand for its content, for machines that cannot read
    the files, such as the one that submits a job.
    """

    def all_samples(self, settings: RunSettings) -> Any:
        """Return digests of all sample sets of the run, question sets included."""

    def training_samples(self, settings: RunSettings, stage: TrainingStage) -> Any:
        """Return a digest of the samples that a stage trains on, with their weights."""

    def questions(self, settings: RunSettings) -> Mapping[str, Any]:
        """Return question set -> digest of its questions and of how they are scored."""

    def cache_key(self, settings: RunSettings) -> Any:
        """Return the key of the feature cache."""

    def llm(self, path: str) -> Any:
        """Return a fingerprint of a language model."""

    def projector(self, uri: str) -> Any:
        """Return the digest of a stage-1 projector file."""

    def model(self, uri: str) -> Any:
        """Return a digest of a finished model directory."""

    def choose_versions(
        self, settings: RunSettings, stage: TrainingStage, content: Mapping[str, Any]
    ) -> Versions | None:
        """Choose versions of index and cache for a stage with this content; None before cache_features has run."""

    def question_images(self, settings: RunSettings) -> Mapping[str, Any] | None:
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
    """Return the stages that a run goes through, in order.

    If the settings name a projector or a model, the run lacks the stages that would train it.
    """
    stages: list[Stage] = ["cache_features"]
    model = settings.evaluate.model
    if settings.data.sources("pretrain") and not settings.finetune.pretrained and not model:
        stages.append("pretrain")
    if settings.data.sources("finetune") and not model:
        stages.append("finetune")
    if settings.data.evaluate and (model or "finetune" in stages):
        stages.append("evaluate")
    return tuple(stages)


def identify(settings: RunSettings, stage: Stage, facts: Facts) -> StageIdentity:
    """Return the identity of one stage of a run.

    Args:
        settings: settings of the run.
        stage: name of the stage.
        facts: content behind the names in the settings.

    Raises:
        SettingsError: the run lacks settings that the stage needs, for example its samples.
    """
    if stage == "cache_features":
        return StageIdentity(stage, {"samples": facts.all_samples(settings), **_features(settings, facts)})
    if stage == "evaluate":
        return _identify_evaluation(settings, facts)
    return _identify_training(settings, stage, facts)


def identify_all(settings: RunSettings, facts: Facts) -> dict[Stage, StageIdentity]:
    """Return the identities of all stages that a run goes through, in order."""
    return {stage: identify(settings, stage, facts) for stage in stages_of(settings)}


def _identify_training(settings: RunSettings, stage: TrainingStage, facts: Facts) -> StageIdentity:
    content = {
        "samples": facts.training_samples(settings, stage),
        **_features(settings, facts),
        "data": mathematical_settings(settings.data),
        "projector": mathematical_settings(settings.projector),
        "llm": {**mathematical_settings(settings.llm), "fingerprint": facts.llm(settings.llm.path)},
        "settings": mathematical_settings(settings.training(stage)),
        "parent": _parent(settings, facts) if stage == "finetune" else None,
    }
    versions = facts.choose_versions(settings, stage, content)
    return StageIdentity(stage, {**content, "images": versions and versions.index_digest}, versions)


def _parent(settings: RunSettings, facts: Facts) -> Any:
    """Return the digest of the projector that stage 2 starts from; None if the run trains no projector first."""
    if settings.finetune.pretrained:
        return facts.projector(settings.finetune.pretrained)
    if settings.data.sources("pretrain"):
        return identify(settings, "pretrain", facts).digest
    return None


def _identify_evaluation(settings: RunSettings, facts: Facts) -> StageIdentity:
    named = settings.evaluate.model
    content = {
        "model": facts.model(named) if named else identify(settings, "finetune", facts).digest,
        "evaluate": mathematical_settings(settings.evaluate),
        "dtype": settings.llm.dtype,
        "data": mathematical_settings(settings.data),
        **_features(settings, facts),
        "questions": facts.questions(settings),
        "images": facts.question_images(settings),
    }
    return StageIdentity("evaluate", content)


def _features(settings: RunSettings, facts: Facts) -> dict[str, Any]:
    return {"cache": facts.cache_key(settings), "codec": settings.cache.codec}


class NamesAlone:
    """Facts without reading a file: each path stands for its content.

    Stages with the same names have the same content as long as files do not change. The reverse does not hold: a copy of a file
    has another name.
    """

    def all_samples(self, settings: RunSettings) -> Any:
        data = settings.data
        return [data.pretrain, data.finetune, data.held_out, self.questions(settings)]

    def training_samples(self, settings: RunSettings, stage: TrainingStage) -> Any:
        return settings.data.sources(stage)

    def questions(self, settings: RunSettings) -> Mapping[str, Any]:
        return {name: questions.model_dump(mode="json") for name, questions in settings.data.evaluate.items()}

    def cache_key(self, settings: RunSettings) -> Any:
        vision = {**mathematical_settings(settings.vision), "path": settings.vision.path}
        return [vision, mathematical_settings(settings.slicing)]

    def llm(self, path: str) -> Any:
        return path

    def projector(self, uri: str) -> Any:
        return uri

    def model(self, uri: str) -> Any:
        return uri

    def choose_versions(
        self, settings: RunSettings, stage: TrainingStage, content: Mapping[str, Any]
    ) -> Versions | None:
        return None

    def question_images(self, settings: RunSettings) -> Mapping[str, Any] | None:
        return None
