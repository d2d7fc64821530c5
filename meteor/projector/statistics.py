"""Statistics of the selection: entropy of the two experts and their disagreement, as sums and then means.

Letters: B sub-images, P patches, K kept tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from meteor.projector.selection import keep_highest


class SelectionSums(NamedTuple):
    """Sums over one batch, each 0-d; a vector (`NUM_SUMS`,) of them is added over micro batches and workers.

    Attributes:
        num_sub_images: number of sub-images with a real patch.
        visual_entropy: entropy -sum_i VS_i log VS_i of the visual scores, in nats, summed over these sub-images.
        native_entropy: entropy -sum_i NS_i log NS_i of the native scores, in nats, summed over these sub-images.
        num_disagreements: tokens among the visual expert's best K that are not among the native expert's best K, summed
            over sub-images with more than K real patches. A sub-image that keeps all its patches makes no choice.
        num_chosen: K times the number of sub-images with more than K real patches: the tokens kept by choice.
    """

    num_sub_images: Tensor
    visual_entropy: Tensor
    native_entropy: Tensor
    num_disagreements: Tensor
    num_chosen: Tensor


NUM_SUMS = len(SelectionSums._fields)


@torch.no_grad()
def sum_selection(visual_BP: Tensor, native_BP: Tensor, mask_BP: Tensor, *, k: int) -> Tensor:
    """Sum the statistics of a batch's selection, without reads on the host.

    The choice of each expert alone follows equation 6 of the paper, with ties to the lower index. The share of
    disagreement therefore does not depend on lambda or on its warm-up.

    Args:
        visual_BP: visual scores VS, (B, P), 0 at padding.
        native_BP: native scores NS, (B, P), 0 at padding.
        mask_BP: mask of patches, (B, P) bool, True at real patches; sub-images without real patches are ignored.
        k: most tokens to keep per sub-image.

    Returns:
        The fields of `SelectionSums` in order, (`NUM_SUMS`,) float32; zeros for B = 0.
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
    """Compute a step's metrics from its sums over micro batches and workers.

    Args:
        sums: sum of the results of `sum_selection`, (`NUM_SUMS`,); zeros if the projector has no such scores.

    Returns:
        ``visual_entropy`` and ``native_entropy`` (nats, means over sub-images) and ``expert_disagreement`` (share of the
        tokens kept by choice, 0 to 1). A metric is absent if nothing was counted.
    """
    totals = dict(zip(SelectionSums._fields, sums.tolist(), strict=True))
    means = {}
    if totals["num_sub_images"]:
        means = {name: totals[name] / totals["num_sub_images"] for name in ("visual_entropy", "native_entropy")}
    if totals["num_chosen"]:
        means["expert_disagreement"] = totals["num_disagreements"] / totals["num_chosen"]
    return means


def _choice(score_BP: Tensor, mask_BP: Tensor, k: int) -> Tensor:
    """Mark the best k patches, (B, P) bool; correct only for sub-images with more than k real patches."""
    indices_BK, _ = keep_highest(score_BP, mask_BP, k)
    return torch.zeros_like(mask_BP).scatter(1, indices_BK, True)


def _entropy(score_BP: Tensor, mask_BP: Tensor) -> Tensor:
    return torch.special.entr(torch.where(mask_BP, score_BP.float(), 0)).sum()
