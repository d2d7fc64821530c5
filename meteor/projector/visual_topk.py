"""Pruning by class-token attention: the patches with the highest attention are kept, nothing else.

Letters: B sub-images, P patches, K kept tokens, C vision width, D LLM width.
"""

import torch
from torch import Tensor

from meteor.image.elastic import TokenCounts
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.selection import keep_highest, visual_scores
from meteor.ssm.tensors import gather_rows


class VisualTopK(Projector):
    """Selection of the k patches with the highest class-token attention, then the MLP (FasterVLM, arXiv 2412.01818).

    Attention is the mean over heads. Kept patches stay in map order; ties go to the lower index. The projector equals Meteor
    with lambda = 1 and without fusion, so any gain of Meteor comes from fusion and the native expert. It has 31,467,520
    parameters at C = 1024, D = 5120.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        k: most tokens to keep per sub-image, or several numbers (`meteor.image.elastic`), of which the largest is the default.

    Raises:
        SettingsError: ``k`` is not a number of at least 1, a list of numbers or a range.
    """

    takes_k = True

    def __init__(self, vision_width: int, llm_width: int, *, k: int | list[int] | dict[str, int] = 144) -> None:
        super().__init__()
        self.vision_width, self.k = vision_width, TokenCounts.read("k", k).largest
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self,
        features: Tensor,
        cls_attention: Tensor,
        grids: Tensor,
        native_weight: Tensor | None = None,
        k: int | None = None,
    ) -> ProjectorOutput:
        """Return tokens (B, min(k, P), D) with their patches and the visual scores; `Projector` describes the arguments.

        Raises:
            ValueError: attention at a real patch is NaN, infinite or negative.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        score_BP = visual_scores(cls_attention, mask_BP).detach()
        indices_BK, kept_BK = keep_highest(score_BP, mask_BP, self.k if k is None else k)
        token_BKD = self.mlp(gather_rows(feature_BPC, indices_BK))
        return ProjectorOutput(torch.where(kept_BK.unsqueeze(-1), token_BKD, 0), kept_BK, indices_BK, score_BP)
