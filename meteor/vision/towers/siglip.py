"""SigLIP and SigLIP 2: no class token; a trained query pools the patches after the last block."""

from typing import Any, ClassVar

import torch

from meteor.vision.towers.clip import clip_block
from meteor.vision.towers.protocol import Block, Importance, PoolingHead, Position, interpolated


class SiglipTower:
    """`transformers.SiglipVisionModel` as a `meteor.vision.towers.Tower`: SigLIP, and SigLIP 2 of a fixed resolution."""

    default_importance: ClassVar[Importance] = "pooling_query"
    num_prefix = 0
    has_class_token = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[Block] = [clip_block(layer) for layer in model.encoder.layers]

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        embedding = self.model.embeddings.patch_embedding
        return embedding.weight.flatten(1), embedding.bias

    def position(self, grid: tuple[int, int]) -> Position:
        weight = self.model.embeddings.position_embedding.weight
        return Position(weight[:0], interpolated(self.model.embeddings, grid, 0, weight))

    def begin(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        return hidden_TC

    def pooling_head(self) -> PoolingHead | None:
        if not self.model.use_head:
            return None
        return PoolingHead(self.model.post_layernorm, self.model.head.attention, self.model.head.probe)


class NaflexTower(SiglipTower):
    """`transformers.Siglip2VisionModel` (SigLIP 2 NaFlex): patches arrive flattened, and each grid resizes the positions.

    Transformers pads flattened patches to a common number and masks the padding. Here sub-images are packed without padding.
    """

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        embedding, side = self.model.embeddings.patch_embedding, self.model.embeddings.patch_size
        # A patch's values are in the order row, column, colour there.
        weight_CF = embedding.weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2).flatten(1)
        return weight_CF, embedding.bias

    def position(self, grid: tuple[int, int]) -> Position:
        embeddings = self.model.embeddings
        weight, side = embeddings.position_embedding.weight, embeddings.position_embedding_size
        num_patches = grid[0] * grid[1]
        resized_1PC = embeddings.resize_positional_embeddings(
            weight.reshape(side, side, -1), torch.tensor([grid]), max_length=num_patches
        )
        return Position(weight[:0], resized_1PC[0])
