"""Checks and choices about a stage's language model, from its configuration alone: before weights are loaded."""

import torch
from transformers import PretrainedConfig

from meteor.config import RunSettings
from meteor.errors import SettingsError
from meteor.model.positions import num_positions
from meteor.model.trial import find_ways
from meteor.model.ways import Way, choose_way
from meteor.stages import TrainingStage
from meteor.train.build import DTYPES, read_llm_config


def find_way(
    settings: RunSettings,
    stage: TrainingStage,
    *,
    llm: PretrainedConfig | None = None,
    device: torch.device | None = None,
) -> Way:
    """Choose attention and batching of a stage.

    Args:
        settings: settings of the run.
        stage: the training stage.
        llm: configuration of the language model; None to read it.
        device: device of a training worker; the kind that the settings ask for if None, as this machine may have no GPU.

    Raises:
        SettingsError: the attention or the batching of the settings does not work with the language model.
    """
    return choose_way(
        find_ways(llm or read_llm_config(settings.llm.path)),
        attention=settings.llm.attention,
        batching=settings.training(stage).batching,
        device=device or torch.device("cuda" if settings.runtime.gpus_per_worker else "cpu"),
        dtype=DTYPES[settings.llm.dtype],
    )


def check_max_length(settings: RunSettings, stage: TrainingStage) -> None:
    """Refuse samples longer than the language model's positions.

    Raises:
        SettingsError: max_length is above the number of positions.
    """
    limit, max_length = num_positions(read_llm_config(settings.llm.path)), settings.training(stage).max_length
    if limit is not None and max_length > limit:
        raise SettingsError(
            f"{stage}.max_length={max_length}, but the language model {settings.llm.path!r} has {limit} positions: set "
            f"{stage}.max_length={limit} or less"
        )
