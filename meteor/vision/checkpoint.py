"""Configuration files of an encoder's checkpoint: the vision tower's shape, and how it wants its pixels."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import SettingsError
from meteor.image.slicing import Resample
from meteor.pretrained import local_model, read_config
from meteor.vision.towers import require_supported

EXAMPLE = "openai/clip-vit-large-patch14-336"
# Files hold 1/255 with all digits of a double, or fewer.
_ROUNDING = 1e-4
# Numbers of Pillow's filters in files.
_RESAMPLE: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Defaults of CLIP's image processor; files of other towers name their values, because their processors' defaults differ.
_CLIP_DEFAULTS = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}


@dataclass(frozen=True)
class Preprocessing:
    """Preparation of pixels with which an encoder was trained, besides rescaling by 1/255.

    Attributes:
        mean, std: normalisation per colour channel.
        resample: filter that resizes images.
    """

    mean: Sequence[float]
    std: Sequence[float]
    resample: Resample


def read_vision_config(path: str) -> PretrainedConfig:
    """Read the vision tower's configuration from a checkpoint of a two-tower model or of the tower alone.

    Raises:
        SettingsError: the configuration belongs to another kind of model; see also `meteor.pretrained.read_config`.
    """
    config = read_config(path, setting="vision.path", example=EXAMPLE)
    vision_config = getattr(config, "vision_config", config)
    require_supported(vision_config, path)
    return vision_config


def read_preprocessing(path: str, config: PretrainedConfig) -> Preprocessing:
    """Read from the checkpoint's image processor how it prepares pixels.

    Transformers 5 saves it inside ``processor_config.json`` if there is a tokenizer, otherwise in
    ``preprocessor_config.json``.

    Args:
        path: local directory, s3:// folder or hub id.
        config: configuration of the vision tower.

    Raises:
        SettingsError: the checkpoint has no image processor, or one that prepares pixels in another way.
    """
    settings = _read_image_processor(path)
    if config.model_type == "clip_vision_model":
        settings = {**_CLIP_DEFAULTS, **settings}
    problems = [
        f"{name} is {settings[name]!r}, not {expected!r}"
        for name, expected in (("do_normalize", True), ("do_rescale", True))
        if settings.get(name, expected) is not expected
    ]
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > _ROUNDING:
        problems.append(f"rescale_factor is {factor!r}, not 1/255")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if not isinstance(values, list | tuple) or len(values) != len(CLIP_MEAN) or not all(map(_is_number, values)):
            problems.append(f"{name} is {values!r}, not three numbers")
    resample = settings.get("resample")
    if not isinstance(resample, int) or resample not in _RESAMPLE:
        problems.append(f"resample is {resample!r}, not 1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    if problems:
        raise SettingsError(
            f"vision.path={path!r}: its image processor prepares pixels in a way that is not supported: {'; '.join(problems)}"
        )
    return Preprocessing(settings["image_mean"], settings["image_std"], _RESAMPLE[settings["resample"]])


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
