"""Parts of a vision tower that the packed pass needs, under names that all architectures share.

Letters: T tokens of all sub-images, R prefix tokens (class token, then registers), P patches of a sub-image, F values of a
patch's pixels, C vision width, Q head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

# A row tells the visual expert how important each patch is. The class token's row and the mean attention that a patch receives
# come from the block of a layer. The pooling query's row comes from the head after the last block.
Importance = Literal["class_token", "pooling_query", "attention_received"]

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Modules of a pre-norm transformer block.

    Attributes:
        norm1, norm2: norms before attention and before the MLP.
        q, k, v, out: projections of attention.
        mlp: the MLP's module.
        scale1, scale2: factors of attention's and the MLP's output (LayerScale); None without.
    """

    norm1: Map
    q: Map
    k: Map
    v: Map
    out: Map
    norm2: Map
    mlp: Any
    scale1: Map | None = None
    scale2: Map | None = None


@dataclass(frozen=True)
class Position:
    """Everything of a patch grid that does not depend on pixels.

    Attributes:
        prefix: prefix tokens with their positions, (R, C).
        patches: position embeddings of the patches, (P, C); None without.
        rotary: cosine and sine that rotate the patches' queries and keys, (P, Q) each; None without.
    """

    prefix: torch.Tensor
    patches: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class PoolingHead:
    """Pooling head, in which one trained query attends to the patches.

    Attributes:
        norm: norm between the last block and the head.
        attention: the head's attention.
        query: the trained query, (1, 1, C).
    """

    norm: Map
    attention: torch.nn.MultiheadAttention
    query: torch.Tensor


class Tower(Protocol):
    """A vision tower of one architecture.

    Attributes:
        model: model of transformers.
        blocks: transformer blocks in order.
        num_prefix: number of class and register tokens before the patches, R.
        has_class_token: whether the first prefix token is a class token.
        default_importance: importance row that the architecture was trained to have.
    """

    model: Any
    blocks: list[Block]
    num_prefix: int
    has_class_token: bool
    default_importance: ClassVar[Importance]

    def patch_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight (C, F) and bias (C,) of the patch embedding; a patch's values are in the order colour, row, column."""

    def position(self, grid: tuple[int, int]) -> Position:
        """Return positions for a grid of patch rows and columns."""

    def begin(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Return the input of the first block for embedded tokens."""

    def pooling_head(self) -> PoolingHead | None:
        """Return the pooling head; None if the tower has none."""


def interpolated(embeddings: Any, grid: tuple[int, int], num_prefix: int, weight: torch.Tensor) -> torch.Tensor:
    """Return transformers' own interpolation of learned positions to a grid, (R + P, C), as a copy.

    Args:
        embeddings: embedding module with ``interpolate_pos_encoding``.
        grid: patch rows and columns.
        num_prefix: number of prefix tokens with a learned position.
        weight: table of positions, (..., C).
    """
    # transformers reads nothing but the shape of this argument.
    shape_only = weight.new_empty(1).expand(1, num_prefix + grid[0] * grid[1], weight.shape[-1])
    height, width = (side * embeddings.patch_size for side in grid)
    return embeddings.interpolate_pos_encoding(shape_only, height, width)[0].clone()
