"""LLaVA-PruMerge+: outliers of class-token attention and evenly spaced patches, merged with their neighbours.

Letters: B sub-images, P patches, K tokens, N neighbours, C vision width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from meteor.projector.checks import check_count
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.selection import keep_highest, visual_scores
from meteor.ssm.tensors import accumulation_dtype, gather_rows


class PruMergePlus(Projector):
    """Adaptive pruning: a token for each attention outlier, and some evenly spaced tokens (arXiv 2403.15388).

    Outliers are patches with class-token attention above Q3 + 1.5 IQR of their sub-image. Each kept token becomes the mean of
    itself and the ``neighbours`` most similar dropped patches (cosine), weighted by class-token attention. The two-layer MLP
    follows: 31,467,520 parameters at C = 1024, D = 5120. Tokens are in map order.

    **On features**: the original compares keys of CLIP's attention, which are not cached; here features are compared. **Our
    choice**: quartiles are linearly interpolated. Outliers are taken by attention, up to ``max_tokens``; the tokens left over,
    at most ``spaced``, are patches at even distances on the map.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        max_tokens: most tokens per sub-image.
        spaced: most evenly spaced tokens among them.
        neighbours: number of dropped patches merged into each token, N.

    Raises:
        SettingsError: a setting is not an integer of at least 1.
    """

    def __init__(
        self, vision_width: int, llm_width: int, *, max_tokens: int = 144, spaced: int = 72, neighbours: int = 32
    ) -> None:
        super().__init__()
        for name, value in (("max_tokens", max_tokens), ("spaced", spaced), ("neighbours", neighbours)):
            check_count(name, value)
        self.vision_width, self.max_tokens, self.spaced, self.neighbours = vision_width, max_tokens, spaced, neighbours
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, min(max_tokens, P), D); the mask says which are real. `Projector` describes the arguments.

        Raises:
            ValueError: attention at a real patch is NaN, infinite or negative.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        score_BP = visual_scores(cls_attention, mask_BP).detach()
        rank_BP = choose(score_BP, mask_BP, self.max_tokens, self.spaced)
        indices_BK, kept_BK = keep_highest(rank_BP, rank_BP > 0, self.max_tokens)
        merged_BKC = merge_neighbours(feature_BPC, score_BP, mask_BP & (rank_BP == 0), indices_BK, self.neighbours)
        tokens = torch.where(kept_BK.unsqueeze(-1), self.mlp(merged_BKC.to(dtype)), 0)
        return ProjectorOutput(tokens, kept_BK, indices_BK, score_BP)


def choose(score_BP: Tensor, mask_BP: Tensor, max_tokens: int, spaced: int) -> Tensor:
    """Mark outliers and evenly spaced patches by values above 0, (B, P), at most ``max_tokens`` per sub-image."""
    outlier_BP = mask_BP & (score_BP > upper_fence(score_BP, mask_BP))
    best_BK, is_best_BK = keep_highest(score_BP, outlier_BP, max_tokens)
    chosen_BP = torch.zeros_like(score_BP).scatter_add(1, best_BK, is_best_BK.to(score_BP.dtype)) > 0
    num_patches_B1 = mask_BP.sum(dim=1, keepdim=True)
    room_B1 = (max_tokens - chosen_BP.sum(dim=1, keepdim=True)).clamp(max=spaced).minimum(num_patches_B1)
    patch_P = torch.arange(mask_BP.shape[1], device=mask_BP.device)
    # Patch p is the j-th of m evenly spaced patches if p = floor(j n / m), that is, if ceil(p m / n) rises after p.
    first_BP = -(-patch_P * room_B1 // num_patches_B1.clamp(min=1))
    after_BP = -(-(patch_P + 1) * room_B1 // num_patches_B1.clamp(min=1))
    return (chosen_BP | (mask_BP & (after_BP > first_BP))).to(score_BP.dtype)


def upper_fence(score_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Return Q3 + 1.5 (Q3 - Q1) over the real patches of each sub-image, (B, 1)."""
    if not mask_BP.shape[1]:
        return score_BP.new_zeros(score_BP.shape[0], 1)
    # torch.quantile takes no mask, so the quartiles are read from the sorted scores; padding is sorted last.
    in_order_BP = torch.where(mask_BP, score_BP, torch.inf).sort(dim=1).values
    last_B1 = (mask_BP.sum(dim=1, keepdim=True) - 1).clamp(min=0)

    def quartile(share: float) -> Tensor:
        place_B1 = last_B1 * share
        lower_B1 = place_B1.floor().long()
        low_B1, high_B1 = (in_order_BP.gather(1, i) for i in (lower_B1, (lower_B1 + 1).minimum(last_B1)))
        return low_B1 + (place_B1 - lower_B1) * (high_B1 - low_B1)

    first_B1, third_B1 = quartile(0.25), quartile(0.75)
    return third_B1 + 1.5 * (third_B1 - first_B1)


def merge_neighbours(
    feature_BPC: Tensor, score_BP: Tensor, dropped_BP: Tensor, indices_BK: Tensor, neighbours: int
) -> Tensor:
    """Average each kept patch with the dropped patches most similar to it, weighted by attention.

    Args:
        feature_BPC: patch features, (B, P, C), finite at padding.
        score_BP: weight of each patch, (B, P); if a token and all its neighbours weigh 0, they are averaged equally.
        dropped_BP: mask of dropped patches, (B, P) bool.
        indices_BK: kept patches, (B, K) long.
        neighbours: number of neighbours per token, N; all dropped patches if a sub-image has fewer.

    Returns:
        Merged tokens, (B, K, C), in at least float32.
    """
    dtype = accumulation_dtype(feature_BPC.dtype)
    row_BPC = feature_BPC.to(dtype)
    unit_BPC = F.normalize(row_BPC, dim=-1)
    similarity_BKP = gather_rows(unit_BPC, indices_BK) @ unit_BPC.transpose(1, 2)
    similarity_BKP = torch.where(dropped_BP.unsqueeze(1), similarity_BKP, -torch.inf)
    nearest_BKN = similarity_BKP.sort(dim=-1, descending=True, stable=True).indices[..., :neighbours]
    near_BKP = torch.zeros_like(similarity_BKP, dtype=torch.bool).scatter(2, nearest_BKN, True) & dropped_BP.unsqueeze(
        1
    )
    own_BKP = torch.arange(row_BPC.shape[1], device=row_BPC.device) == indices_BK.unsqueeze(-1)
    member_BKP = near_BKP | own_BKP
    weight_BKP = torch.where(member_BKP, score_BP.to(dtype).unsqueeze(1), 0)
    total_BK1 = weight_BKP.sum(dim=-1, keepdim=True)
    weight_BKP = torch.where(total_BK1 > 0, weight_BKP, member_BKP.to(dtype))
    return weight_BKP @ row_BPC / weight_BKP.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
