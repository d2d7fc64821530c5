"""DINOv2 and DINOv3: a class token, registers, and factors behind attention and MLP (LayerScale)."""

from typing import Any, ClassVar

import torch

from meteor.vision.towers.protocol import Block, Importance, PoolingHead, Position, interpolated


class Dinov2Tower:
    """`transformers.Dinov2Model`, or the model with registers, as a `meteor.vision.towers.Tower`."""

    default_importance: ClassVar[Importance] = "class_token"
    has_class_token = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[Block] = [_block(layer) for layer in self._layers()]
        self.num_prefix: int = 1 + getattr(model.config, "num_register_tokens", 0)

    def _layers(self) -> Any:
        return self.model.encoder.layer

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        convolution = self.model.embeddings.patch_embeddings.projection
        return convolution.weight.flatten(1), convolution.bias

    def position(self, grid: tuple[int, int]) -> Position:
        embeddings = self.model.embeddings
        position_LC = interpolated(embeddings, grid, 1, embeddings.position_embeddings)
        prefix_RC = embeddings.cls_token[0] + position_LC[:1]
        if self.num_prefix > 1:  # registers have no position
            prefix_RC = torch.cat([prefix_RC, embeddings.register_tokens[0]])
        return Position(prefix_RC, position_LC[1:])

    def begin(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        return hidden_TC

    def pooling_head(self) -> PoolingHead | None:
        return None


class Dinov3Tower(Dinov2Tower):
    """`transformers.DINOv3ViTModel`: positions are rotations of the patches' queries and keys (RoPE)."""

    def _layers(self) -> Any:
        return self.model.model.layer

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        convolution = self.model.embeddings.patch_embeddings
        return convolution.weight.flatten(1), convolution.bias

    def position(self, grid: tuple[int, int]) -> Position:
        embeddings, side = self.model.embeddings, self.model.config.patch_size
        prefix_RC = torch.cat([embeddings.cls_token[0], embeddings.register_tokens[0]])
        # transformers reads nothing but shape, dtype and device of this argument.
        shape_only = embeddings.cls_token.new_empty(1).expand(1, 3, grid[0] * side, grid[1] * side)
        rope = self.model.rope_embeddings
        # transformers keeps the frequencies in float32, but a cast of the loaded model would round them to its own dtype.
        exponents = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float32, device=shape_only.device)
        rotary = torch.func.functional_call(rope, {"inv_freq": 1 / rope.base**exponents}, (shape_only,))
        return Position(prefix_RC, None, rotary)


def _block(layer: Any) -> Block:
    attention = layer.attention
    return Block(
        norm1=layer.norm1,
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        out=attention.o_proj,
        norm2=layer.norm2,
        mlp=layer.mlp,
        scale1=layer.layer_scale1,
        scale2=layer.layer_scale2,
    )
