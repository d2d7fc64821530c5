"""Visual-Native Selection: the class token and the instruction token rank the tokens, and the best are kept.

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
    """Tokens kept of each sub-image, and the scores that chose them.

    Attributes:
        indices: kept patches in map order, (B, K) long; 0 at slots where ``mask`` is False.
        mask: mask of slots, (B, K) bool, True at kept tokens; they come first.
        scores: aggregate score that ranked the tokens, (B, P) float32; 0 at padding.
        visual_scores: score of the visual expert, (B, P) float32; sums to 1 over real patches, or to 0 if they got no
            attention.
        native_scores: score of the native expert, (B, P) float32; sums to 1 over real patches.
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

    Scores are computed in float32 over real patches only. They carry gradients if their inputs do; the choice carries
    none. Ties go to the lower index. A sub-image of at most k patches keeps them all.

    Args:
        fused: fused tokens F, (B, P, C); padding may hold anything.
        instruction: instruction token INS after fusion, (B, C).
        cls_attention: attention of the class token over patches, (B, P), finite and not negative, of any scale; padding
            may hold anything.
        mask: mask of patches, (B, P) bool, True at real patches.
        k: most tokens to keep per sub-image; K = min(k, P).
        visual_weight: weight lambda of the visual expert in the aggregate, in [0, 1].
        native_weight: weight of the native expert, 0-d; ``1 - visual_weight`` if None. Both weights have an effect only
            with ``experts="visual_native"``.
        experts: experts that rank the tokens, ``"visual_native"``, ``"visual"`` or ``"native"``.
        native_scale: factor above 0 in equation 4, NS = softmax(native_scale * <F_i, INS>). The paper uses 1. A dot product
            over C channels grows with C: at C = 1024 the unscaled softmax is nearly one-hot (for independent normal
            vectors the highest of 576 scores is 0.93 on average). With attention's usual scale C ** -0.5 it is 0.02.

    Returns:
        The kept tokens and their scores.

    Raises:
        SettingsError: k, visual_weight, experts or native_scale is out of range.
        ValueError: at a real patch, attention is NaN, infinite or negative, or the dot product of fused and instruction is
            not finite (RuntimeError in a compiled graph).
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
    """Return the visual expert's scores (equation 3), (B, P) float32, with sum 1 over real patches.

    Args:
        cls_attention: attention of the class token over patches, (B, P), of any scale; padding may hold anything.
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
    """Return each patch's share of the class token's attention to patches (equation 3), (B, P)."""
    attention_BP = torch.where(mask_BP, cls_attention.to(accumulation_dtype(cls_attention.dtype)), 0)
    total_B1 = attention_BP.sum(dim=1, keepdim=True)
    # A sub-image whose patches get no attention has scores of 0 instead of 0 / 0.
    return attention_BP / total_B1.clamp(min=torch.finfo(total_B1.dtype).tiny)


def _native_logits(fused_BPC: Tensor, instruction_BC: Tensor, mask_BP: Tensor, scale: float) -> Tensor:
    """Return <F_i, INS> times the scale, (B, P); 0 at padding, whatever it holds."""
    dtype = accumulation_dtype(fused_BPC.dtype)
    # Padding is cleared before the product: its NaN would come back in the gradient of INS as 0 * NaN.
    real_BPC = torch.where(mask_BP.unsqueeze(-1), fused_BPC.to(dtype), 0)
    # A sum of products instead of a matrix product, which autocast would run in half precision.
    logit_BP = (real_BPC * instruction_BC.to(dtype).unsqueeze(1)).sum(dim=-1) * scale
    return torch.where(mask_BP, logit_BP, 0)


def _native_scores(logit_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Return the softmax over real patches (equation 4), (B, P); 0 at padding."""
    return torch.where(mask_BP, torch.where(mask_BP, logit_BP, -torch.inf).softmax(dim=1), 0)


def keep_highest(score_BP: Tensor, mask_BP: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k highest scores among real patches (equation 6); ties go to the lower index.

    Args:
        score_BP: score of each patch, (B, P), not NaN at real patches.
        mask_BP: mask of patches, (B, P) bool, True at real patches.
        k: most patches to keep; K = min(k, P).

    Returns:
        Kept patches, (B, K) long, in map order, 0 at empty slots; and mask, (B, K) bool, True at kept patches, which come
        first.
    """
    max_patches = mask_BP.shape[1]
    # torch.topk promises no order among equal scores; a stable sort puts the lower index first.
    ranking_BP = torch.where(mask_BP, score_BP, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    best_BK = ranking_BP[:, :k]
    padding_last_BK = torch.where(mask_BP.gather(1, best_BK), best_BK, max_patches).sort(dim=1).values
    kept_BK = padding_last_BK < max_patches
    return torch.where(kept_BK, padding_last_BK, 0), kept_BK


def _require_sound(
    cls_attention: Tensor, logit_BP: Tensor, mask_BP: Tensor, fused: Tensor, instruction: Tensor
) -> None:
    """Refuse values that cannot be ranked: a NaN among the scores would be kept or dropped without notice."""
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
    # Comparisons with NaN are false, so NaN counts as unsound here.
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
