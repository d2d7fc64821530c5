"""LLaVA-1.5's projector: a two-layer MLP on every token.

Letters: B sub-images, P patches, D LLM width.
"""

import torch
from torch import Tensor, nn

from meteor.projector.inputs import prepare_features
from meteor.projector.output import Projector, ProjectorOutput


def two_layer_mlp(in_width: int, out_width: int) -> nn.Sequential:
    """Build LLaVA-1.5's Linear, GELU, Linear: 31,467,520 parameters from width 1024 to 5120."""
    return nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


class MLPProjector(Projector):
    """LLaVA-1.5's projector: every patch becomes a visual token (arXiv 2310.03744).

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
    """

    def __init__(self, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Project every token.

        Args:
            features: patch features, (B, P, C), any floating dtype; padding may hold anything.
            cls_attention: attention of the class token over patches, (B, P); unused.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            native_weight: weight of the native expert; unused.

        Returns:
            Tokens, (B, P, D), in the weights' dtype, without scores or auxiliary loss.

        Raises:
            ValueError: a shape is wrong, or a grid does not fit P.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        token_BPD = torch.where(mask_BP.unsqueeze(-1), self.mlp(feature_BPC), 0)
        patch_BP = torch.arange(mask_BP.shape[1], device=mask_BP.device).expand_as(mask_BP)
        return ProjectorOutput(tokens=token_BPD, mask=mask_BP, indices=torch.where(mask_BP, patch_BP, 0))
