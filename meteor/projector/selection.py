"""Visual-Native Selection: keeps the tokens that the class token and the instruction token find most important.

Letters: B sub-images, P patches, K kept tokens, C width of the fused tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meteor.projector.checks import check_choice, check_count, check_fraction
from meteor.ssm.tensors import accumulation_dtype

EXPERTS = ("visual_native", "visual", "native")


@dataclass(frozen=True)
class Selection:
    """Which tokens of each sub-image are kept, and why.

    Attributes:
        indices: (B, K) long, kept patches in map order; 0 where ``mask`` is False.
        mask: (B, K) bool, True at kept tokens; they come first.
        scores: (B, P) float32, the aggregate the tokens were ranked by; 0 at padding.
        visual_scores: (B, P) float32, sums to 1 over real patches (to 0 if no attention fell on any).
        native_scores: (B, P) float32, sums to 1 over real patches.
    """

    indices: Tensor
    mask: Tensor
    scores: Tensor
    visual_scores: Tensor
    native_scores: Tensor


def select_tokens(
    fused: Tensor,
    instruction: Tensor,
    cls_attention: Tensor,
    mask: Tensor,
    *,
    k: int,
    visual_weight: float = 0.8,
    native_weight: Tensor | None = None,
    experts: str = "visual_native",
) -> Selection:
    """Score the tokens and keep the best k of each sub-image (LLaVA-Meteor, section 3.3, equations 3-6).

    Scores are computed in float32 over real patches alone and carry gradients if their inputs do; the choice itself
    carries none. Ties go to the lower index. A sub-image of at most k patches keeps them all.

    Args:
        fused: (B, P, C), F.
        instruction: (B, C), INS as fusion left it.
        cls_attention: (B, P), the class token's attention over patches, not negative; any scale, padding may hold
            anything.
        mask: (B, P) bool, True at real patches.
        k: most tokens to keep of a sub-image; K = min(k, P).
        visual_weight: lambda, the visual expert's share of the aggregate.
        native_weight: 0-d, the native expert's; ``1 - visual_weight`` when None. Both weigh ``"visual_native"`` alone.
        experts: ``"visual_native"``, ``"visual"`` or ``"native"``.

    Returns:
        `Selection`.

    Raises:
        SettingsError: k, visual_weight or experts is out of range.
    """
    check_count("k", k)
    check_fraction("visual_weight", visual_weight)
    check_choice("experts", experts, EXPERTS)
    visual_BP = _visual_scores(cls_attention, mask)
    native_BP = _native_scores(fused, instruction, mask)
    if experts == "visual":
        score_BP = visual_BP
    elif experts == "native":
        score_BP = native_BP
    else:
        score_BP = (
            visual_weight * visual_BP + (1 - visual_weight if native_weight is None else native_weight) * native_BP
        )
    indices_BK, kept_BK = _keep_highest(score_BP, mask, k)
    return Selection(indices_BK, kept_BK, score_BP, visual_BP, native_BP)


def _visual_scores(cls_attention: Tensor, mask_BP: Tensor) -> Tensor:
    """Equation 3: the patches' share of the class token's attention, its own share removed."""
    attention_BP = torch.where(mask_BP, cls_attention.to(accumulation_dtype(cls_attention.dtype)), 0)
    total_B1 = attention_BP.sum(dim=1, keepdim=True)
    return attention_BP / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)


def _native_scores(fused_BPC: Tensor, instruction_BC: Tensor, mask_BP: Tensor) -> Tensor:
    """Equation 4: softmax over the patches of <F_i, INS>."""
    dtype = accumulation_dtype(fused_BPC.dtype)
    # Not a matrix product: autocast would run it in half precision.
    logit_BP = (fused_BPC.to(dtype) * instruction_BC.to(dtype).unsqueeze(1)).sum(dim=-1)
    logit_BP = torch.where(mask_BP, logit_BP, -torch.inf)
    return torch.where(mask_BP, logit_BP.softmax(dim=1), 0)


def _keep_highest(score_BP: Tensor, mask_BP: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equation 6: indices (B, K) in map order and mask (B, K) of the k highest scores."""
    max_patches = mask_BP.shape[1]
    # torch.topk promises no order among equals; a stable sort leaves the lower index first.
    ranking_BP = torch.where(mask_BP, score_BP, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    best_BK = ranking_BP[:, :k]
    padding_last_BK = torch.where(mask_BP.gather(1, best_BK), best_BK, max_patches).sort(dim=1).values
    kept_BK = padding_last_BK < max_patches
    return torch.where(kept_BK, padding_last_BK, 0), kept_BK
