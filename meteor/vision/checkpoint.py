"""Configuration files of a CLIP checkpoint: the vision tower's shape and the normalisation of pixels."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig
from transformers.utils import cached_file

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import SettingsError
from meteor.pretrained import local_model


def read_vision_config(path: str) -> CLIPVisionConfig:
    """Read the vision tower's configuration from a checkpoint of CLIP or of its tower alone.

    Raises:
        SettingsError: there is no configuration, or it belongs to another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(local_model(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"vision.path={path!r} has no readable configuration ({error}). Give a local directory with config.json "
            "and weights, or a hub id that this machine can reach, such as openai/clip-vit-large-patch14-336"
        ) from error
    vision_config = getattr(config, "vision_config", config)
    if not isinstance(vision_config, CLIPVisionConfig):
        raise SettingsError(
            f"vision.path={path!r} holds a {config.model_type!r} model; a CLIP vision encoder is needed"
        )
    return vision_config


def read_normalisation(path: str) -> tuple[Sequence[float], Sequence[float]]:
    """Read mean and standard deviation from ``preprocessor_config.json``; without the file, return CLIP's own."""
    file = cached_file(local_model(path), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return CLIP_MEAN, CLIP_STD
    config = json.loads(Path(file).read_text())
    return config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
