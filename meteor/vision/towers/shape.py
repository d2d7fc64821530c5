"""Shape of a vision tower, from its configuration alone."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class TowerShape:
    """Sizes that decide about memory, arithmetic and slicing.

    Attributes:
        width: C.
        mlp_width: width of the MLP's hidden layer.
        gated_mlp: whether another projection of the MLP's input gates its hidden layer.
        num_blocks: transformer blocks.
        patch_size: side of a patch in pixels.
        resolution: side in pixels of the square images for which the positions were trained.
        num_prefix: class and register tokens before the patches.
    """

    width: int
    mlp_width: int
    gated_mlp: bool
    num_blocks: int
    patch_size: int
    resolution: int
    num_prefix: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "TowerShape":
        """Read the shape from a supported configuration (`meteor.vision.towers.require_supported`)."""
        has_class_token = config.model_type not in ("siglip_vision_model", "siglip2_vision_model")
        return cls(
            width=config.hidden_size,
            mlp_width=_mlp_width(config),
            gated_mlp=bool(getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)),
            num_blocks=config.num_hidden_layers,
            patch_size=config.patch_size,
            resolution=_resolution(config),
            num_prefix=has_class_token + getattr(config, "num_register_tokens", 0),
        )

    @property
    def grid_side(self) -> int:
        """Patches along a side of the square images for which the positions were trained."""
        return self.resolution // self.patch_size


def _mlp_width(config: PretrainedConfig) -> int:
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        return config.intermediate_size
    width = int(config.hidden_size * config.mlp_ratio)
    # Two thirds, rounded up to a multiple of 8, as in transformers' Dinov2SwiGLUFFN.
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width


def _resolution(config: PretrainedConfig) -> int:
    if config.model_type == "siglip2_vision_model":
        return math.isqrt(config.num_patches) * config.patch_size
    size = config.image_size
    return size if isinstance(size, int) else min(size)
