"""FLOPs of a vision tower's pass, from its shape and the number of patches.

Letters: T tokens of a sub-image (patches, class token and registers), C vision width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from meteor.vision.towers import Importance, TowerShape, default_importance


@dataclass(frozen=True)
class EncoderShape:
    """Shape of the encoder, as far as it decides the arithmetic.

    Attributes:
        width: C.
        mlp_width: width of the hidden layer in each block's MLP.
        num_blocks: transformer blocks that are run.
        patch_size: pixels of a patch's side.
        num_prefix: class and register tokens.
    """

    width: int
    mlp_width: int
    num_blocks: int
    patch_size: int
    num_prefix: int = 1

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        *,
        select_layer: int,
        attention_layers: Sequence[int],
        importance: Importance | None = None,
    ) -> "EncoderShape":
        """Read the shape from a tower's configuration; the other arguments are those of `meteor.vision.encoder.FrozenEncoder`.

        Blocks after the last layer that is read do not run, and hidden state 0 is the input of the first block. The pooling
        query comes after all blocks.
        """
        shape = TowerShape.of(config)
        pools = (importance or default_importance(config)) == "pooling_query"
        layers = [select_layer, *attention_layers, *([-1] if pools else [])]
        num_blocks = max(layer if layer >= 0 else shape.num_blocks + 1 + layer for layer in layers)
        # A gated MLP has three matrices instead of two.
        mlp_width = shape.mlp_width * 3 // 2 if shape.gated_mlp else shape.mlp_width
        return cls(shape.width, mlp_width, num_blocks, shape.patch_size, shape.num_prefix)

    def flops(self, num_patches: int) -> int:
        """Count the multiplications and additions for one sub-image, without the reading of importance rows."""
        tokens = num_patches + self.num_prefix
        projections = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.mlp_width)
        attention = 4 * tokens**2 * self.width
        embedding = 2 * num_patches * 3 * self.patch_size**2 * self.width
        return self.num_blocks * (projections + attention) + embedding
