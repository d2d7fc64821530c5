"""Frozen CLIP: what it sees in a sub-image (patch features) and where its class token looks (one attention row).

Letters: P patches of a sub-image, C vision width, A attention layers asked for, H heads, Q width of a head.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import cached_file

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import BadImageError, SettingsError
from meteor.pretrained import load_pretrained
from meteor.vision.digest import weights_digest


@dataclass(frozen=True)
class SubImageFeatures:
    """What the encoder gives for one sub-image.

    Attributes:
        features: (P, C), the patch tokens of the selected layer, row-major in the patch grid.
        cls_attention: (A, P) float32, softmax attention of the class token over the patches, mean over heads. The class
            token's share of itself is left out, so a row sums to less than one.
        cls: (C,), the class token of the selected layer.
        grid: (Hu, Wu), patch rows and columns.
    """

    features: torch.Tensor
    cls_attention: torch.Tensor
    cls: torch.Tensor
    grid: tuple[int, int]


class FrozenClip:
    """A CLIP vision tower that never trains. Blocks after the last one that is needed are not run.

    Args:
        model: the vision tower, in evaluation mode.
        select_layer: index into ``hidden_states`` as in LLaVA; -2 is the output of the last block but one.
        attention_layers: for which hidden states the attention of the block that made them is returned.
        digest: fingerprint of the weights as stored, before any cast.
        mean, std: the normalisation the tower was trained with.

    Raises:
        SettingsError: a layer that the tower does not have.
    """

    def __init__(
        self,
        model: CLIPVisionModel,
        *,
        select_layer: int = -2,
        attention_layers: Sequence[int] = (-2,),
        digest: str | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.num_blocks: int = model.config.num_hidden_layers
        self.select_layer, self.attention_layers = select_layer, tuple(attention_layers)
        self._select_block = self._block_of(select_layer)
        self._attention_blocks = [self._block_of(layer) for layer in self.attention_layers]
        self.weights_digest = digest or weights_digest(model.state_dict())
        self.mean, self.std = tuple(mean), tuple(std)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        select_layer: int = -2,
        attention_layers: Sequence[int] = (-2,),
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "FrozenClip":
        """Load the vision tower of a CLIP checkpoint, from a local directory or a hub id (`.safetensors` or `.bin`).

        The digest is taken over the weights as they are stored; ``dtype`` then casts (stored type when None).

        Raises:
            SettingsError: there is no CLIP checkpoint at ``path``.
        """
        vision_config = read_vision_config(path)
        model = load_pretrained(
            CLIPVisionModel,
            path,
            setting="vision.path",
            example="openai/clip-vit-large-patch14-336",
            config=vision_config,
            dtype="auto",
            attn_implementation="sdpa",
        )
        digest = weights_digest(model.state_dict())
        mean, std = read_normalisation(path)
        model = model.to(device=device, dtype=dtype)
        return cls(
            model, select_layer=select_layer, attention_layers=attention_layers, digest=digest, mean=mean, std=std
        )

    @property
    def width(self) -> int:
        """C."""
        return self.model.config.hidden_size

    @property
    def patch_size(self) -> int:
        """Pixels on the side of a patch."""
        return self.model.config.patch_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the cache key says about pixels: rescale by 1/255, then normalise."""
        return {"rescale": "1/255", "mean": list(self.mean), "std": list(self.std)}

    def _block_of(self, layer: int) -> int:
        """0-based index of the block whose output is ``hidden_states[layer]``."""
        block = (layer if layer >= 0 else self.num_blocks + 1 + layer) - 1
        if not 0 <= block < self.num_blocks:
            raise SettingsError(
                f"layer {layer} does not exist: the encoder has {self.num_blocks} blocks, "
                f"so layers are 1 ... {self.num_blocks} or -{self.num_blocks} ... -1"
            )
        return block

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[SubImageFeatures]:
        """Encode sub-images of any patch grids; those of equal size share a batch.

        Args:
            pixels: normalised float tensors (3, h, w), h and w multiples of the patch size.

        Returns:
            One `SubImageFeatures` for each, in the order given, on the encoder's device.

        Raises:
            BadImageError: an activation is not finite.
            SettingsError: a size is not a multiple of the patch size.
        """
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, pixels_3HW in enumerate(pixels):
            by_size[pixels_3HW.shape[-2], pixels_3HW.shape[-1]].append(i)
        results: dict[int, SubImageFeatures] = {}
        for indices in by_size.values():
            encoded = self._encode_equal(torch.stack([pixels[i] for i in indices]))
            results.update(zip(indices, encoded, strict=True))
        return [results[i] for i in range(len(pixels))]

    def _encode_equal(self, pixels_B3HW: torch.Tensor) -> list[SubImageFeatures]:
        rows, columns = (side // self.patch_size for side in pixels_B3HW.shape[-2:])
        if (rows * self.patch_size, columns * self.patch_size) != tuple(pixels_B3HW.shape[-2:]):
            raise SettingsError(
                f"a sub-image of {tuple(pixels_B3HW.shape[-2:])} pixels does not divide into {self.patch_size}-pixel patches"
            )
        weight = self.model.embeddings.patch_embedding.weight
        pixels_B3HW = pixels_B3HW.to(device=weight.device, dtype=weight.dtype)
        # hidden_BTC: T = 1 + P tokens, the class token first.
        hidden_BTC = self.model.embeddings(pixels_B3HW, interpolate_pos_encoding=True)
        hidden_BTC = self.model.pre_layrnorm(hidden_BTC)
        attention: dict[int, torch.Tensor] = {}
        selected_BTC = hidden_BTC
        for i in range(max([self._select_block, *self._attention_blocks]) + 1):
            block = self.model.encoder.layers[i]
            if i in self._attention_blocks:
                attention[i] = class_token_attention(block, hidden_BTC)
            hidden_BTC = block(hidden_BTC, attention_mask=None)
            if i == self._select_block:
                selected_BTC = hidden_BTC
        if not torch.isfinite(selected_BTC).all():
            raise BadImageError("non_finite_features", "the encoder produced values that are not finite")
        attention_BAP = torch.stack([attention[i] for i in self._attention_blocks], dim=1)
        return [
            SubImageFeatures(tokens_TC[1:], attention_AP, tokens_TC[0], (rows, columns))
            for tokens_TC, attention_AP in zip(selected_BTC, attention_BAP, strict=True)
        ]


def read_vision_config(path: str) -> CLIPVisionConfig:
    """Configuration of the vision tower of a CLIP checkpoint, whole or tower alone.

    Raises:
        SettingsError: nothing there, or another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
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


def class_token_attention(block: Any, hidden_BTC: torch.Tensor) -> torch.Tensor:
    """Attention of the class token over the patches in one block, without the other P rows of the map.

    softmax(q k^T / sqrt(Q)) with q of the class token alone; sdpa, which returns no attentions, can then serve all blocks.

    Args:
        block: a CLIP encoder layer.
        hidden_BTC: its input, class token first.

    Returns:
        (B, P) float32, mean over heads.
    """
    attention = block.self_attn
    normed_BTC = block.layer_norm1(hidden_BTC)
    num_heads = attention.num_heads
    q_BHQ = attention.q_proj(normed_BTC[:, 0]).unflatten(-1, (num_heads, -1))
    k_BTHQ = attention.k_proj(normed_BTC).unflatten(-1, (num_heads, -1))
    scores_BHT = torch.einsum("bhq,bthq->bht", q_BHQ.float(), k_BTHQ.float()) * q_BHQ.shape[-1] ** -0.5
    return scores_BHT.softmax(dim=-1)[:, :, 1:].mean(dim=1)


def read_normalisation(path: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation from the checkpoint's ``preprocessor_config.json``; CLIP's own where it has none."""
    file = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return CLIP_MEAN, CLIP_STD
    config = json.loads(Path(file).read_text())
    return config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
