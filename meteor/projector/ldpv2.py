"""MobileVLM V2's projector: an MLP, average pooling, and a depth-wise convolution over the pooled map.

Letters: B sub-images, P patches, K tokens, g side of the pooled map, C vision width, D LLM width.
"""

import torch
from torch import Tensor, nn

from meteor.projector.checks import check_count
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.pooling import pool_maps


class LDPv2(Projector):
    """Pooling projector that turns each sub-image into g^2 tokens (LDPv2, MobileVLM V2, arXiv 2402.03766).

    The two-layer MLP runs on every patch, and its map is averaged to g x g. A depth-wise 3 x 3 convolution of the pooled map
    (with bias, zeros outside) is added; the paper calls it positional encoding. The projector has 31,518,720 parameters at
    C = 1024, D = 5120.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        grid: side of the pooled map in tokens, g.

    Raises:
        SettingsError: ``grid`` is not an integer of at least 1.
    """

    def __init__(self, vision_width: int, llm_width: int, *, grid: int = 12) -> None:
        super().__init__()
        check_count("grid", grid)
        self.vision_width, self.grid = vision_width, grid
        self.mlp = two_layer_mlp(vision_width, llm_width)
        self.positions = nn.Conv2d(llm_width, llm_width, 3, padding=1, groups=llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, g^2, D) in map order, all real; `Projector` describes the arguments."""
        dtype = self.positions.weight.dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        pooled_BKD = pool_maps(self.mlp(feature_BPC), grids.to(mask_BP.device).long(), (self.grid, self.grid))
        map_BDgg = pooled_BKD.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        token_BKD = (map_BDgg + self.positions(map_BDgg)).flatten(2).transpose(1, 2)
        return ProjectorOutput(token_BKD, torch.ones(token_BKD.shape[:2], dtype=torch.bool, device=token_BKD.device))
