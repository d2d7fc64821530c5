"""Configuration files of a CLIP checkpoint: the vision tower's shape and the normalisation of pixels."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig
from transformers.utils import cached_file

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import SettingsError
from meteor.pretrained import local_model, read_config

# Files hold 1/255 with all digits of a double, or fewer.
_ROUNDING = 1e-4


def read_vision_config(path: str) -> CLIPVisionConfig:
    """Read the vision tower's configuration from a checkpoint of CLIP or of its tower alone.

    Raises:
        SettingsError: the configuration belongs to another kind of model; see also `meteor.pretrained.read_config`.
    """
    config = read_config(path, setting="vision.path", example="openai/clip-vit-large-patch14-336")
    vision_config = getattr(config, "vision_config", config)
    if not isinstance(vision_config, CLIPVisionConfig):
        raise SettingsError(
            f"vision.path={path!r} holds a {config.model_type!r} model; a CLIP vision encoder is needed"
        )
    return vision_config


def read_normalisation(path: str) -> tuple[Sequence[float], Sequence[float]]:
    """Read mean and standard deviation per colour channel from the checkpoint's image processor.

    Transformers 5 saves it inside ``processor_config.json``, earlier versions in ``preprocessor_config.json``.

    Raises:
        SettingsError: the checkpoint has no image processor, or one that prepares pixels in another way.
    """
    settings = _read_image_processor(path)
    problems = [
        f"{name} is {settings[name]!r}, not {expected!r}"
        for name, expected in (("do_normalize", True), ("do_rescale", True))
        if settings.get(name, expected) is not expected
    ]
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > _ROUNDING:
        problems.append(f"rescale_factor is {factor!r}, not 1/255")
    # A key that is absent has the default of CLIP's image processor.
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list | tuple) or len(values) != len(CLIP_MEAN) or not all(map(_is_number, values)):
            problems.append(f"{name} is {values!r}, not three numbers")
    if problems:
        raise SettingsError(
            f"vision.path={path!r}: its image processor prepares pixels in a way that is not supported: {'; '.join(problems)}"
        )
    return mean, std


def _read_image_processor(path: str) -> dict[str, Any]:
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = cached_file(local_model(path), name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            settings = content if key is None else content.get(key)
        except (OSError, ValueError, AttributeError) as error:
            raise SettingsError(f"vision.path={path!r}: {name} cannot be read ({error}): copy it again") from error
        if isinstance(settings, dict):
            return settings
    raise SettingsError(
        f"vision.path={path!r} has neither preprocessor_config.json nor an image processor in processor_config.json, so that "
        "the normalisation of its pixels is not known: copy the file from where the weights come from"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
