"""How sure the two experts of the selection are, and how often they disagree: sums to be added, then means.

Letters: B sub-images, P patches, K kept tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from meteor.projector.selection import keep_highest


class SelectionSums(NamedTuple):
    """What one batch adds, each 0-d; as one vector (`NUM_SUMS`,) it is added over micro batches and workers.

    Attributes:
        num_sub_images: those with a real patch.
        visual_entropy: sum over them of -sum_i VS_i log VS_i, in nats.
        native_entropy: the same of NS.
        num_disagreements: tokens among the visual expert's own best K that are not among the native expert's, over
            sub-images with more than K real patches. One that keeps all its patches leaves nothing to disagree about.
        num_chosen: K for each of those sub-images: the tokens kept by choice.
    """

    num_sub_images: Tensor
    visual_entropy: Tensor
    native_entropy: Tensor
    num_disagreements: Tensor
    num_chosen: Tensor


NUM_SUMS = len(SelectionSums._fields)


@torch.no_grad()
def sum_selection(visual_BP: Tensor, native_BP: Tensor, mask_BP: Tensor, *, k: int) -> Tensor:
    """Sum what there is to know of a batch's selection; nothing is read on the host.

    Each expert's own choice follows equation 6 of the paper, ties to the lower index, whatever weight it has in the
    aggregate: the share of disagreement does not depend on lambda or its warm-up.

    Args:
        visual_BP: (B, P) VS, 0 at padding.
        native_BP: (B, P) NS, 0 at padding.
        mask_BP: mask of patches, (B, P) bool, True at real patches; a sub-image without any counts for nothing.
        k: most tokens to keep per sub-image.

    Returns:
        (`NUM_SUMS`,) float32, the fields of `SelectionSums` in order; zeros for B = 0.
    """
    num_patches_B = mask_BP.sum(dim=1)
    chooses_B = num_patches_B > k
    in_both_BP = _choice(visual_BP, mask_BP, k) & _choice(native_BP, mask_BP, k)
    num_disagreements_B = torch.where(chooses_B, k - in_both_BP.sum(dim=1), 0)
    sums = SelectionSums(
        num_sub_images=(num_patches_B > 0).sum(),
        visual_entropy=_entropy(visual_BP, mask_BP),
        native_entropy=_entropy(native_BP, mask_BP),
        num_disagreements=num_disagreements_B.sum(),
        num_chosen=chooses_B.sum() * k,
    )
    return torch.stack([value.float() for value in sums])


def mean_selection(sums: Tensor) -> dict[str, float]:
    """Metrics of a step from its sums over micro batches and workers.

    Args:
        sums: (`NUM_SUMS`,), added up from `sum_selection`; zeros where a projector has no such scores.

    Returns:
        ``visual_entropy`` and ``native_entropy`` (nats, means over sub-images) and ``expert_disagreement`` (share of the
        tokens kept by choice, 0 to 1); each only where something was counted.
    """
    one = dict(zip(SelectionSums._fields, sums.tolist(), strict=True))
    means = {}
    if one["num_sub_images"]:
        means = {name: one[name] / one["num_sub_images"] for name in ("visual_entropy", "native_entropy")}
    if one["num_chosen"]:
        means["expert_disagreement"] = one["num_disagreements"] / one["num_chosen"]
    return means


def _choice(score_BP: Tensor, mask_BP: Tensor, k: int) -> Tensor:
    """(B, P) bool, the best k; right where there are more than k to choose from."""
    indices_BK, _ = keep_highest(score_BP, mask_BP, k)
    return torch.zeros_like(mask_BP).scatter(1, indices_BK, True)


def _entropy(score_BP: Tensor, mask_BP: Tensor) -> Tensor:
    return torch.special.entr(torch.where(mask_BP, score_BP.float(), 0)).sum()
