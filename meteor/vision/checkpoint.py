"""What a CLIP checkpoint says beside its weights: the vision tower's shape, and how pixels are normalised."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig
from transformers.utils import cached_file

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import SettingsError
from meteor.pretrained import local_model


def read_vision_config(path: str) -> CLIPVisionConfig:
    """Configuration of the vision tower of a CLIP checkpoint, whole or tower alone.

    Raises:
        SettingsError: nothing there, or another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(local_model(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"vision.path={path!r} has no configuration that can be read ({error}). Give a local directory with config.json "
            "and weights, or a hub id that this machine can reach, such as openai/clip-vit-large-patch14-336"
        ) from error
    vision_config = getattr(config, "vision_config", config)
    if not isinstance(vision_config, CLIPVisionConfig):
        raise SettingsError(
            f"vision.path={path!r} holds a {config.model_type!r} model; a CLIP vision encoder is needed"
        )
    return vision_config


def read_normalisation(path: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation from the checkpoint's ``preprocessor_config.json``; CLIP's own where it has none."""
    file = cached_file(local_model(path), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return CLIP_MEAN, CLIP_STD
    config = json.loads(Path(file).read_text())
    return config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
