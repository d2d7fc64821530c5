"""Preparation of a training stage before its workers start: identity, folder, samples, and projector to start from."""

from dataclasses import dataclass

from meteor.assembly.inputs import Inputs
from meteor.cache import DatasetIndex, FeatureCache
from meteor.data.sample_sets import SampleSet
from meteor.data.table_plan import TablePlan
from meteor.errors import SettingsError
from meteor.model import MeteorConfig
from meteor.runs.folder import StageFolder
from meteor.runs.identity import StageIdentity, Versions, identify
from meteor.stages import TrainingStage
from meteor.text.tokenizer import find_visual_tokens
from meteor.text.tokens import check_template
from meteor.train.build import read_fitting_projector, read_llm_config
from meteor.vision.checkpoint import read_vision_config


@dataclass(frozen=True)
class PreparedStage:
    """A training stage that is ready to start.

    Attributes:
        folder: the stage's folder, finished or not.
        versions: versions of index and cache that the stage reads.
        sets: sample sets that the stage trains on.
        index: the dataset index, at the version that the stage reads.
        cache: the feature cache, at the version that the stage reads.
        parent: URI and digest of the projector that stage 2 starts from; None for stage 1.
    """

    folder: StageFolder
    versions: Versions
    sets: list[SampleSet]
    index: DatasetIndex
    cache: FeatureCache
    parent: dict[str, str] | None

    @property
    def identity(self) -> StageIdentity:
        return self.folder.identity

    @property
    def stage(self) -> TrainingStage:
        return self.identity.stage  # type: ignore[return-value]


def prepare(inputs: Inputs, stage: TrainingStage) -> PreparedStage:
    """Find everything that a training stage needs to start.

    Raises:
        SettingsError: the stage has no samples, or stage 1 has not finished before stage 2.
        CacheError: cache_features has not run over all images of the stage.
    """
    sets = inputs.training_sets(stage)
    parent = _parent(inputs) if stage == "finetune" else None
    identity = identify(inputs, stage)
    # If `identify` finds no versions, `current_versions` raises with the reason.
    versions = identity.versions or inputs.current_versions(stage)
    return PreparedStage(
        folder=StageFolder(inputs.settings.output, identity),
        versions=versions,
        sets=sets,
        index=inputs.index_version(versions.index_version),
        cache=inputs.cache_at(versions.cache_version),
        parent=parent,
    )


def _parent(inputs: Inputs) -> dict[str, str]:
    """Find URI and digest of the stage-1 projector: the one that the settings name, or the result of the run's stage 1."""
    settings = inputs.settings
    named = settings.finetune.pretrained
    if named:
        return {"uri": named, "digest": inputs.projector()}
    if not settings.data.sources("pretrain"):
        raise SettingsError("stage 2 needs a projector: set finetune.pretrained, or data.pretrain and run pretrain")
    own = StageFolder(settings.output, identify(inputs, "pretrain"))
    summary = own.finished()
    if summary is None:
        raise SettingsError(
            "stage 1 of this run has not finished: run pretrain with the same settings first, or set finetune.pretrained"
        )
    return {"uri": summary.results["projector"], "digest": own.digest}


def check_stage(inputs: Inputs, stage: TrainingStage) -> None:
    """Check the template, and a projector that ``finetune.pretrained`` names, before workers start.

    Raises:
        SettingsError: prompts would differ from the text that is trained on.
        CheckpointError: the projector was trained with other settings.
    """
    settings = inputs.settings
    check_template(inputs.tokenizer(), settings.training(stage).template)
    if stage != "finetune" or settings.finetune.pretrained is None:
        return
    config = MeteorConfig(
        text_config=read_llm_config(settings.llm.path),
        vision_config=read_vision_config(settings.vision.path),
        projector={"name": settings.projector.name, **settings.projector.settings},
        select_layer=settings.vision.select_layer,
        cache_identity=inputs.cache_identity().to_dict(),
    )
    read_fitting_projector(config, settings.finetune.pretrained)


def check_token_ids(inputs: Inputs, *plans: TablePlan | None) -> None:
    """Check that every token that training may feed has a row in the language model's embedding.

    Args:
        inputs: settings of the run, and what they name.
        *plans: samples to train on, and held-out samples; None if the run has none.

    Raises:
        SettingsError: a token has none; on a worker this would be an index error, on a GPU without a word about the token.
    """
    path, tokenizer = inputs.settings.llm.path, inputs.tokenizer()
    num_rows = read_llm_config(path).get_text_config().vocab_size
    visual_tokens = find_visual_tokens(tokenizer)
    # The tokens that begin and end a sample belong to its text.
    fed = {
        "padding": tokenizer.pad_token_id,
        "separating slices": visual_tokens.slice_id,
        "separating rows": visual_tokens.row_id,
        "a sample's text": max(plan.table.max_token_id() for plan in plans if plan),
    }
    for purpose, token in fed.items():
        if token >= num_rows:
            raise SettingsError(
                f"llm.path={path!r}: the tokenizer's token {tokenizer.convert_ids_to_tokens(token)!r} for {purpose} has the id "
                f"{token}, and the model's embedding has {num_rows} rows: remove the token from the tokenizer's files, or give "
                "a model whose embedding has been enlarged"
            )


def find_model(inputs: Inputs) -> tuple[str, str]:
    """Find URI and digest of the model to evaluate: the one that the settings name, or the result of the run's stage 2.

    Raises:
        SettingsError: stage 1 or stage 2 has not finished.
    """
    settings = inputs.settings
    named = settings.evaluate.model
    if named:
        return named, inputs.model()
    own = StageFolder(settings.output, identify(inputs, "finetune"))
    summary = own.finished()
    if summary is None:
        _parent(inputs)  # raises if stage 1 must run first
        raise SettingsError("stage 2 of this run has not finished: run finetune first, or set evaluate.model")
    return summary.results["model"], own.digest
