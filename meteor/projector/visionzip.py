"""VisionZip: the patches with the most class-token attention, and the others merged into a few tokens.

Letters: B sub-images, P patches, K tokens, J contextual tokens, C vision width, D LLM width.
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


class VisionZip(Projector):
    """Dominant tokens by class-token attention, contextual tokens by merging the rest (arXiv 2412.04467).

    Among the patches that are not dominant, ``contextual`` targets are taken at even distances in map order. Each remaining
    patch joins the target most similar to it (cosine), and a contextual token is the mean of its patches. The two-layer MLP
    follows: 31,467,520 parameters at C = 1024, D = 5120. Dominant tokens come first, each kind in map order.

    **On features**: the original compares keys of CLIP's attention, which are not cached; here features are compared.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        dominant: largest number of dominant tokens per sub-image.
        contextual: largest number of contextual tokens per sub-image.

    Raises:
        SettingsError: a setting is not an integer of at least 1.
    """

    def __init__(self, vision_width: int, llm_width: int, *, dominant: int = 108, contextual: int = 36) -> None:
        super().__init__()
        check_count("dominant", dominant)
        check_count("contextual", contextual)
        self.vision_width, self.dominant, self.contextual = vision_width, dominant, contextual
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, K, D), K = min(dominant + contextual, P); merged tokens have the index of their target.

        `Projector` describes the arguments.

        Raises:
            ValueError: attention at a real patch is NaN, infinite or negative.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        score_BP = visual_scores(cls_attention, mask_BP).detach()
        dominant_BK, is_dominant_BK = keep_highest(score_BP, mask_BP, self.dominant)
        # Empty slots point at patch 0. Adding their mask, which is 0, does not mark that patch as taken.
        taken_BP = torch.zeros_like(score_BP).scatter_add(1, dominant_BK, is_dominant_BK.to(score_BP.dtype)) > 0
        rest_BP = mask_BP & ~taken_BP
        max_contextual = min(self.contextual, mask_BP.shape[1] - dominant_BK.shape[1])
        target_BJ, is_target_BJ = even_targets(rest_BP, self.contextual, max_contextual)
        merged_BJC = merge_into(feature_BPC, rest_BP, target_BJ, is_target_BJ)
        kept_BKC = torch.cat([gather_rows(feature_BPC, dominant_BK), merged_BJC.to(dtype)], dim=1)
        mask_BK = torch.cat([is_dominant_BK, is_target_BJ], dim=1)
        indices_BK = torch.cat([dominant_BK, target_BJ], dim=1)
        tokens = torch.where(mask_BK.unsqueeze(-1), self.mlp(kept_BKC), 0)
        return ProjectorOutput(tokens, mask_BK, indices_BK, score_BP)


def even_targets(rest_BP: Tensor, count: int, max_targets: int) -> tuple[Tensor, Tensor]:
    """Choose patches at even distances: target j of c = min(count, n) is number floor(j n / c) of the n remaining patches.

    Args:
        rest_BP: mask of remaining patches, (B, P) bool.
        count: most targets per sub-image.
        max_targets: number of target slots, J, at least the largest number of targets in the batch.

    Returns:
        Target patches, (B, J) long, 0 at empty slots, and mask, (B, J) bool, True at targets.
    """
    num_rest_B1 = rest_BP.sum(dim=1, keepdim=True)
    num_targets_B1 = num_rest_B1.clamp(max=count)
    target_J = torch.arange(max_targets, device=rest_BP.device)
    is_target_BJ = target_J < num_targets_B1
    number_BJ = torch.where(is_target_BJ, target_J * num_rest_B1 // num_targets_B1.clamp(min=1), 0)
    # A stable sort puts the remaining patches first, in map order.
    in_order_BP = rest_BP.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return torch.where(is_target_BJ, in_order_BP.gather(1, number_BJ), 0), is_target_BJ


def merge_into(feature_BPC: Tensor, rest_BP: Tensor, target_BJ: Tensor, is_target_BJ: Tensor) -> Tensor:
    """Average each target with the patches most similar to it, (B, J, C), in at least float32."""
    dtype = accumulation_dtype(feature_BPC.dtype)
    row_BPC = feature_BPC.to(dtype)
    unit_BPC = F.normalize(row_BPC, dim=-1)
    similarity_BPJ = unit_BPC @ gather_rows(unit_BPC, target_BJ).transpose(1, 2)
    similarity_BPJ = torch.where(is_target_BJ.unsqueeze(1), similarity_BPJ, -torch.inf)
    # A target always joins itself: a duplicate target, equally similar, could otherwise leave it empty.
    own_BPJ = (torch.arange(rest_BP.shape[1], device=rest_BP.device)[:, None] == target_BJ.unsqueeze(1)) & (
        is_target_BJ.unsqueeze(1)
    )
    similarity_BPJ = torch.where(own_BPJ, torch.inf, similarity_BPJ)
    if not target_BJ.shape[1]:
        return row_BPC[:, :0]
    joins_BPJ = F.one_hot(similarity_BPJ.argmax(dim=-1), target_BJ.shape[1]).bool()
    weight_BPJ = (joins_BPJ & rest_BP.unsqueeze(-1) & is_target_BJ.unsqueeze(1)).to(dtype)
    total_BJC = weight_BPJ.transpose(1, 2) @ row_BPC
    return total_BJC / weight_BPJ.sum(dim=1).clamp(min=1).unsqueeze(-1)
