"""Supported vision towers by the ``model_type`` of their configurations."""

from typing import Any

from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from meteor.errors import SettingsError
from meteor.vision.towers.clip import ClipTower
from meteor.vision.towers.dino import Dinov2Tower, Dinov3Tower
from meteor.vision.towers.protocol import Importance, Tower
from meteor.vision.towers.siglip import NaflexTower, SiglipTower

_SUPPORTED: dict[str, tuple[Any, type[ClipTower | SiglipTower | Dinov2Tower]]] = {
    "clip_vision_model": (CLIPVisionModel, ClipTower),
    "siglip_vision_model": (SiglipVisionModel, SiglipTower),
    "siglip2_vision_model": (Siglip2VisionModel, NaflexTower),
    "dinov2": (Dinov2Model, Dinov2Tower),
    "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2Tower),
    "dinov3_vit": (DINOv3ViTModel, Dinov3Tower),
}
_NAMES = (
    "CLIP (clip), SigLIP and SigLIP 2 of fixed resolution (siglip), SigLIP 2 NaFlex (siglip2), DINOv2 (dinov2, "
    "dinov2_with_registers) and DINOv3 ViT (dinov3_vit)"
)


def require_supported(config: PretrainedConfig, path: str) -> None:
    """Check that a vision tower's configuration is of a supported type.

    Raises:
        SettingsError: the type is not supported; the message names those that are.
    """
    if config.model_type not in _SUPPORTED:
        raise SettingsError(
            f"vision.path={path!r} holds a model of type {config.model_type!r}, which is no supported vision encoder. "
            f"Supported are {_NAMES}"
        )
    patch_size = getattr(config, "patch_size", None)
    if not isinstance(patch_size, int):
        raise SettingsError(f"vision.path={path!r}: patch_size is {patch_size!r}; patches must be squares of one size")


def model_class_of(config: PretrainedConfig) -> Any:
    """Return the class of transformers for a supported configuration."""
    return _SUPPORTED[config.model_type][0]


def default_importance(config: PretrainedConfig) -> Importance:
    """Return the importance row that a supported tower has by its training."""
    return _SUPPORTED[config.model_type][1].default_importance


def build_tower(config: PretrainedConfig) -> Any:
    """Build the model of a supported configuration with new weights."""
    require_supported(config, str(config.name_or_path))
    return model_class_of(config)(config)


def tower_of(model: Any) -> Tower:
    """Return a supported model of transformers as a tower.

    Raises:
        SettingsError: the model's type is not supported.
    """
    require_supported(model.config, str(model.config.name_or_path))
    return _SUPPORTED[model.config.model_type][1](model)
