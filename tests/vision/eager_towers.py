"""Vision towers of every supported architecture with random weights, and transformers' own eager results for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PretrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from meteor.vision.towers import model_class_of

_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_MLP = {"intermediate_size": 64}
# Name -> class of the configuration, and a small shape of the real architecture.
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, {**_TINY, **_MLP, "image_size": 56, "patch_size": 14}),
    "siglip": (SiglipVisionConfig, {**_TINY, **_MLP, "image_size": 64, "patch_size": 16}),
    # so400m-patch14-384: 27 patches of 14 pixels, and 6 pixels that no patch covers.
    "siglip_odd": (SiglipVisionConfig, {**_TINY, **_MLP, "image_size": 60, "patch_size": 14}),
    "siglip2_naflex": (Siglip2VisionConfig, {**_TINY, **_MLP, "num_patches": 16, "patch_size": 16}),
    "dinov2": (Dinov2Config, {**_TINY, "mlp_ratio": 2, "image_size": 70, "patch_size": 14, "layerscale_value": 0.3}),
    # Giant's MLP is gated.
    "dinov2_gated": (Dinov2Config, {**_TINY, "image_size": 70, "patch_size": 14, "use_swiglu_ffn": True}),
    "dinov2_registers": (
        Dinov2WithRegistersConfig,
        {**_TINY, "mlp_ratio": 2, "image_size": 70, "patch_size": 14, "num_register_tokens": 3},
    ),
    "dinov3": (
        DINOv3ViTConfig,
        {**_TINY, **_MLP, "image_size": 64, "patch_size": 16, "num_register_tokens": 4, "layerscale_value": 0.3},
    ),
    # 7B's MLP is gated, and its key projection has no bias.
    "dinov3_gated": (
        DINOv3ViTConfig,
        {**_TINY, **_MLP, "image_size": 64, "patch_size": 16, "num_register_tokens": 4, "use_gated_mlp": True},
    ),
}


def make_model(config: PretrainedConfig, *, seed: int = 0, spread: float = 0.1, **options: Any) -> Any:
    """Build a tower whose positions, biases and factors matter, as in trained towers."""
    torch.manual_seed(seed)
    model = model_class_of(config)._from_config(config, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=spread)
    return model


def make_tiny(name: str, **options: Any) -> Any:
    config_class, shape = TINY[name]
    return make_model(config_class(**shape), **options)


@dataclass(frozen=True)
class Eager:
    """Results of transformers for one sub-image, without the tokens before the patches.

    Attributes:
        hidden: patch tokens of every hidden state, (P, C) each.
        maps: attention of every block, (H, R + P, R + P) each.
        cls: first token of every hidden state, (C,) each.
        pooling: attention of the pooling head's query over the patches, (P,); None without a head.
        num_prefix: tokens before the patches, R.
    """

    hidden: list[torch.Tensor]
    maps: list[torch.Tensor]
    cls: list[torch.Tensor]
    pooling: torch.Tensor | None
    num_prefix: int

    def row(self, importance: str, block: int) -> torch.Tensor:
        """Return an importance row from the maps themselves, (P,)."""
        if importance == "pooling_query":
            assert self.pooling is not None
            return self.pooling
        patches = slice(self.num_prefix, None)
        map_LL = self.maps[block].mean(0)
        return map_LL[0, patches] if importance == "class_token" else map_LL[patches, patches].mean(0)


@torch.no_grad()
def eager(model: Any, pixels: Sequence[torch.Tensor]) -> list[Eager]:
    """Run transformers' own forward pass with all maps, one sub-image at a time."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    results = [_eager(model, one) for one in pixels]
    model.set_attn_implementation(before)
    return results


def _eager(model: Any, pixels_3HW: torch.Tensor) -> Eager:
    side = model.config.patch_size
    num_patches = (pixels_3HW.shape[1] // side) * (pixels_3HW.shape[2] // side)
    outputs = {"output_hidden_states": True, "output_attentions": True}
    if model.config.model_type == "siglip2_vision_model":
        given = flattened(pixels_3HW, side)
    elif model.config.model_type in ("clip_vision_model", "siglip_vision_model"):
        given = {"pixel_values": pixels_3HW[None], "interpolate_pos_encoding": True}
    else:
        given = {"pixel_values": pixels_3HW[None]}
    result = model(**given, **outputs)
    num_prefix = result.hidden_states[0].shape[1] - num_patches
    pooling = None
    if getattr(model, "use_head", False):
        final, head = result.last_hidden_state, model.head
        pooling = head.attention(head.probe, final, final, need_weights=True)[1][0, 0]
    return Eager(
        hidden=[state[0, num_prefix:] for state in result.hidden_states],
        maps=[map_1HLL[0] for map_1HLL in result.attentions],
        cls=[state[0, 0] for state in result.hidden_states],
        pooling=pooling,
        num_prefix=num_prefix,
    )


def flattened(pixels_3HW: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """Flatten patches as NaFlex's own image processor does."""
    patches = torch.tensor(convert_image_to_patches(pixels_3HW.numpy(), side))
    return {
        "pixel_values": patches[None],
        "pixel_attention_mask": torch.ones(1, len(patches), dtype=torch.int32),
        "spatial_shapes": torch.tensor([[pixels_3HW.shape[1] // side, pixels_3HW.shape[2] // side]]),
    }
