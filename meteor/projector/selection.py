"""Visual-Native Selection: keeps the tokens that the class token and the instruction token find most important.

Letters: B sub-images, P patches, K kept tokens, C width of the fused tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meteor.projector.checks import check_choice, check_count, check_fraction, check_positive, require
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
    native_scale: float = 1.0,
) -> Selection:
    """Score the tokens and keep the best k of each sub-image (LLaVA-Meteor, section 3.3, equations 3-6).

    Scores are computed in float32 over real patches alone and carry gradients if their inputs do; the choice itself
    carries none. Ties go to the lower index. A sub-image of at most k patches keeps them all.

    Args:
        fused: (B, P, C), F; padding may hold anything.
        instruction: (B, C), INS as fusion left it.
        cls_attention: (B, P), the class token's attention over patches, finite and not negative; any scale, padding may
            hold anything.
        mask: (B, P) bool, True at real patches.
        k: most tokens to keep per sub-image; K = min(k, P).
        visual_weight: lambda, the visual expert's share of the aggregate.
        native_weight: 0-d, the native expert's; ``1 - visual_weight`` when None. Both weigh ``"visual_native"`` alone.
        experts: ``"visual_native"``, ``"visual"`` or ``"native"``.
        native_scale: what equation 4's dot products are multiplied by, NS = softmax(native_scale * <F_i, INS>). 1 is the
            paper. A dot product over C channels grows with C: at C = 1024 the softmax of an unscaled one is nearly one-hot
            (on independent normal vectors the highest of 576 scores is 0.93 on average); C ** -0.5 is attention's usual
            scale (0.02).

    Returns:
        `Selection`.

    Raises:
        SettingsError: k, visual_weight, experts or native_scale is out of range.
        ValueError: at a real patch, attention is NaN, infinite or negative, or fused and instruction give a dot product
            that is not finite (RuntimeError in a compiled graph).
    """
    check_count("k", k)
    check_fraction("visual_weight", visual_weight)
    check_choice("experts", experts, EXPERTS)
    check_positive("native_scale", native_scale)
    logit_BP = _native_logits(fused, instruction, mask, native_scale)
    _require_sound(cls_attention, logit_BP, mask, fused, instruction)
    visual_BP = _visual_scores(cls_attention, mask)
    native_BP = _native_scores(logit_BP, mask)
    if experts == "visual":
        score_BP = visual_BP
    elif experts == "native":
        score_BP = native_BP
    else:
        score_BP = (
            visual_weight * visual_BP + (1 - visual_weight if native_weight is None else native_weight) * native_BP
        )
    indices_BK, kept_BK = keep_highest(score_BP, mask, k)
    return Selection(indices_BK, kept_BK, score_BP, visual_BP, native_BP)


def visual_scores(cls_attention: Tensor, mask_BP: Tensor) -> Tensor:
    """The visual expert by itself (equation 3): (B, P) float32, sums to 1 over real patches.

    Args:
        cls_attention: (B, P), any scale; padding may hold anything.
        mask_BP: mask of patches, (B, P) bool, True at real patches.

    Raises:
        ValueError: attention at a real patch is NaN, infinite or negative (RuntimeError in a compiled graph).
    """
    bad_BP = _unsound_attention(cls_attention, mask_BP)
    require(
        ~bad_BP.any(),
        "cls_attention is NaN, infinite or negative at a real patch; run without torch.compile to learn where.",
        lambda: _describe_attention(cls_attention, bad_BP),
    )
    return _visual_scores(cls_attention, mask_BP)


def _visual_scores(cls_attention: Tensor, mask_BP: Tensor) -> Tensor:
    """Equation 3: the patches' share of the class token's attention, its own share removed."""
    attention_BP = torch.where(mask_BP, cls_attention.to(accumulation_dtype(cls_attention.dtype)), 0)
    total_B1 = attention_BP.sum(dim=1, keepdim=True)
    return attention_BP / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)


def _native_logits(fused_BPC: Tensor, instruction_BC: Tensor, mask_BP: Tensor, scale: float) -> Tensor:
    """<F_i, INS> times the scale; 0 at padding, whatever stands there."""
    dtype = accumulation_dtype(fused_BPC.dtype)
    # Before the product: a NaN of the padding would come back in the gradient of INS as 0 * NaN.
    real_BPC = torch.where(mask_BP.unsqueeze(-1), fused_BPC.to(dtype), 0)
    # Not a matrix product: autocast would run it in half precision.
    logit_BP = (real_BPC * instruction_BC.to(dtype).unsqueeze(1)).sum(dim=-1) * scale
    return torch.where(mask_BP, logit_BP, 0)


def _native_scores(logit_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Equation 4: softmax over the patches."""
    return torch.where(mask_BP, torch.where(mask_BP, logit_BP, -torch.inf).softmax(dim=1), 0)


def keep_highest(score_BP: Tensor, mask_BP: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equation 6: the k highest scores among real patches; ties go to the lower index.

    Args:
        score_BP: (B, P), not NaN at real patches.
        mask_BP: mask of patches, (B, P) bool, True at real patches.
        k: most patches to keep; K = min(k, P).

    Returns:
        Indices (B, K) long in map order, 0 where fewer are kept, and mask (B, K) bool, True at kept patches, which come
        first.
    """
    max_patches = mask_BP.shape[1]
    # torch.topk promises no order among equals; a stable sort leaves the lower index first.
    ranking_BP = torch.where(mask_BP, score_BP, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    best_BK = ranking_BP[:, :k]
    padding_last_BK = torch.where(mask_BP.gather(1, best_BK), best_BK, max_patches).sort(dim=1).values
    kept_BK = padding_last_BK < max_patches
    return torch.where(kept_BK, padding_last_BK, 0), kept_BK


def _require_sound(
    cls_attention: Tensor, logit_BP: Tensor, mask_BP: Tensor, fused: Tensor, instruction: Tensor
) -> None:
    """Refuse what no ranking can be made of: a NaN among scores would be kept, or dropped, in silence."""
    bad_attention_BP = _unsound_attention(cls_attention, mask_BP)
    bad_logit_BP = mask_BP & ~logit_BP.isfinite()

    def details() -> str:
        if bad_attention_BP.any():
            return _describe_attention(cls_attention, bad_attention_BP)
        return _describe_logits(logit_BP, bad_logit_BP, fused, instruction)

    require(
        ~(bad_attention_BP | bad_logit_BP).any(),
        "cls_attention is NaN, infinite or negative at a real patch, or fused and instruction give a dot product that is "
        "not finite; run without torch.compile to learn where.",
        details,
    )


def _unsound_attention(cls_attention: Tensor, mask_BP: Tensor) -> Tensor:
    # Comparisons with NaN are false.
    return mask_BP & ~((cls_attention >= 0) & (cls_attention < torch.inf))


def _describe_attention(cls_attention: Tensor, bad_BP: Tensor) -> str:
    number, patch = bad_BP.nonzero()[0].tolist()
    return (
        f"cls_attention is {cls_attention[number, patch].item()} at patch {patch} of sub-image {number} of the batch; "
        "attention over real patches must be finite and not negative. Check the features (`meteor cache verify`), or "
        "encode them again in float32."
    )


def _describe_logits(logit_BP: Tensor, bad_BP: Tensor, fused: Tensor, instruction: Tensor) -> str:
    number, patch = bad_BP.nonzero()[0].tolist()
    operands = {"fused": fused[number, patch], "instruction": instruction[number]}
    spoilt = [name for name, vector in operands.items() if not vector.isfinite().all()]
    culprit = f"values that are not finite in {' and '.join(spoilt)}" if spoilt else "finite factors that are too large"
    return (
        f"The native score of patch {patch} of sub-image {number} of the batch has the dot product "
        f"{logit_BP[number, patch].item()}: {culprit}. Check the features of this sub-image for NaN; if they are sound, "
        "the projector's weights have diverged: lower the learning rate, or use bfloat16 or float32."
    )
