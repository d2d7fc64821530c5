"""CLIP: a class token, learned positions, and a norm before the first block."""

from typing import Any, ClassVar

import torch

from meteor.vision.towers.protocol import Block, Importance, PoolingHead, Position, interpolated


class ClipTower:
    """`transformers.CLIPVisionModel` as a `meteor.vision.towers.Tower`."""

    default_importance: ClassVar[Importance] = "class_token"
    num_prefix = 1
    has_class_token = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = [clip_block(layer) for layer in model.encoder.layers]

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.model.embeddings.patch_embedding.weight.flatten(1), None

    def position(self, grid: tuple[int, int]) -> Position:
        embeddings = self.model.embeddings
        position_LC = interpolated(embeddings, grid, 1, embeddings.position_embedding.weight)
        return Position(embeddings.class_embedding + position_LC[:1], position_LC[1:])

    def begin(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        return self.model.pre_layrnorm(hidden_TC)

    def pooling_head(self) -> PoolingHead | None:
        return None


def clip_block(layer: Any) -> Block:
    """Return the parts of a block with CLIP's names, which SigLIP shares."""
    attention = layer.self_attn
    return Block(
        norm1=layer.layer_norm1,
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        out=attention.out_proj,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
    )
