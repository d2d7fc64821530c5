"""FocusLLaVA-style vision-guided sampler: a gate chooses the scale at which each region of the map is kept.

Letters: B sub-images, P patches, R regions, N patches per region, S scales, T steps from a scale to the next finer scale
(S - 1), J cells per region at the finest scale, K tokens, C vision width, D LLM width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meteor.errors import SettingsError
from meteor.image.budget import DEFAULT_KEPT_SHARE, DEFAULT_SCALES
from meteor.projector.checks import check_count, check_fraction
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.tokenpacker import most_tokens, square_windows
from meteor.ssm.tensors import accumulation_dtype, gather_rows


class Focus(Projector):
    """Adaptive projector: regions with little information get few tokens (after FocusLLaVA, arXiv 2411.14228).

    **FocusLLaVA-style**: the paper says that regions are down-sampled at several scales and that the scale is chosen
    adaptively; it gives neither sizes nor the gate. Here a region has region x region patches, and scale s averages its
    cells of s x s patches. A gate (Linear, GELU, Linear) maps the mean and variance of the region's patches to a score per
    scale. Patches beyond the map are ignored; a cell without patches gives no token. The two-layer MLP follows. The
    projector has 31,992,835 parameters at C = 1024, D = 5120.

    **The share of tokens is exact** (`choose_scales`): every region starts at the coarsest scale, and the sub-image's
    tokens, target_keep x patches, go to the regions whose scores gain most per token. The price of exactness: sub-images do
    not borrow tokens from each other. Two other ways missed the target (numbers in benchmarks/RESULTS.md):

    - An auxiliary loss moves the expected share under the softmax, which is not the share of the most likely scales. The
      language model's loss pushes the gate as well, and was stronger at most weights.
    - A threshold that follows the running share lags behind the gate. It would also have to be saved and to agree on all
      ranks, and each benchmark would get another number of tokens.

    The chosen tokens are multiplied by 1 + p - stop_gradient(p), so that the gate learns (straight-through). p is the softmax
    over scales of the score less the price of the scale's tokens. The price per token is where the sub-image's tokens ran
    out, so regions at the margin learn most, and the gate's overall level has no effect.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        region: side of a region in patches.
        scales: sides of the cells in patches, ascending divisors of the region's side.
        gate_width: width of the gate's hidden layer.
        target_keep: share of a sub-image's patches that become tokens, between the shares of the coarsest scale and of the
            finest. A small map whose coarsest cells alone exceed the share keeps these.

    Raises:
        SettingsError: a setting has a value out of its range.
    """

    def __init__(
        self,
        vision_width: int,
        llm_width: int,
        *,
        region: int = 4,
        scales: Sequence[int] = DEFAULT_SCALES,
        gate_width: int = 256,
        target_keep: float = DEFAULT_KEPT_SHARE,
    ) -> None:
        super().__init__()
        check_count("region", region)
        check_count("gate_width", gate_width)
        check_fraction("target_keep", target_keep)
        check_scales(region, scales)
        check_target(target_keep, scales)
        self.vision_width, self.region, self.scales, self.target_keep = vision_width, region, tuple(scales), target_keep
        self.gate = nn.Sequential(
            nn.Linear(2 * vision_width, gate_width), nn.GELU(), nn.Linear(gate_width, len(scales))
        )
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, K, D) in the order of regions, row by row in each; K is the largest budget of the batch.

        `Projector` describes the arguments.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        grids, max_patches = grids.to(mask_BP.device).long(), mask_BP.shape[1]
        window_BRN, seen_BRN = square_windows(grids, self.region, most_tokens(grids, max_patches, self.region))
        patch_BRNC = gather_rows(feature_BPC, window_BRN.flatten(1)).unflatten(1, window_BRN.shape[1:])
        cells = [self._cells(patch_BRNC, seen_BRN, scale) for scale in self.scales]
        num_tokens_BRS = torch.stack([is_cell_BRJ.sum(dim=-1) for _, is_cell_BRJ in cells], dim=-1)
        budget_B = (self.target_keep * mask_BP.sum(dim=1).double() + 0.5).floor().long()
        score_BRS = self.gate(region_statistics(patch_BRNC, seen_BRN).to(dtype)).float()
        choice_BR, price_B = choose_scales(score_BRS.detach(), num_tokens_BRS, budget_B)
        probability_BRS = (score_BRS - price_B[:, None, None] * num_tokens_BRS).softmax(dim=-1)
        num_slots = self._num_slots(num_tokens_BRS, budget_B, grids, max_patches)
        token_BKC, mask_BK = _choose(cells, choice_BR, _straight_through(probability_BRS, choice_BR), num_slots)
        return ProjectorOutput(tokens=torch.where(mask_BK.unsqueeze(-1), self.mlp(token_BKC), 0), mask=mask_BK)

    def _num_slots(self, num_tokens_BRS: Tensor, budget_B: Tensor, grids: Tensor, max_patches: int) -> int:
        """Return K, at least the budget of `meteor.image.budget`; a compiled graph, which reads no values, takes a bound."""
        if torch.compiler.is_compiling() or not len(budget_B):
            return most_tokens(grids, max_patches, self.scales[0])
        finest_B, coarsest_B = num_tokens_BRS[..., 0].sum(dim=1), num_tokens_BRS[..., -1].sum(dim=1)
        return int(budget_B.maximum(coarsest_B).minimum(finest_B).max())

    def _cells(self, patch_BRNC: Tensor, seen_BRN: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Average the real patches of each cell, (B, R, J, C), and mark the cells that have any, (B, R, J) bool."""
        side, dtype = self.region // scale, accumulation_dtype(patch_BRNC.dtype)
        shape = (side, scale, side, scale)
        seen = seen_BRN.unflatten(2, shape)
        total = torch.where(seen_BRN.unsqueeze(-1), patch_BRNC.to(dtype), 0).unflatten(2, shape).sum(dim=(3, 5))
        count = seen.sum(dim=(3, 5))
        mean_BRJC = (total / count.clamp(min=1).unsqueeze(-1)).flatten(2, 3).to(patch_BRNC.dtype)
        missing = (self.region // self.scales[0]) ** 2 - side**2
        is_cell_BRJ = nn.functional.pad(count.flatten(2) > 0, (0, missing))
        return nn.functional.pad(mean_BRJC, (0, 0, 0, missing)), is_cell_BRJ


def choose_scales(score_BRS: Tensor, num_tokens_BRS: Tensor, budget_B: Tensor) -> tuple[Tensor, Tensor]:
    """Spend each sub-image's tokens on the regions whose scores gain most per token.

    Regions start at the coarsest scale, which they keep even if all together exceed the budget. Steps to the next finer
    scale are taken in descending order of gain per token until a step no longer fits. A step gains at most as much as the
    coarser step before it, so that the order never skips a scale. Tokens that are left go to the regions whose next step
    still fits. Ties go to the earlier region. The tokens fall short of the budget by less than the smallest step that is
    left. No sub-image depends on another.

    Args:
        score_BRS: scores of the scales, finest first, (B, R, S) float32.
        num_tokens_BRS: tokens of each region at each scale, (B, R, S) long; 0 for regions beyond the map.
        budget_B: tokens of each sub-image, (B,) long.

    Returns:
        Number of the chosen scale, (B, R) long, and the price per token, (B,) float32: the gain per token of the first step
        that did not fit, 0 if all fit.
    """
    coarsest = score_BRS.shape[2] - 1
    if not coarsest:
        return torch.zeros_like(num_tokens_BRS[..., 0]), score_BRS.new_zeros(len(score_BRS))
    cost_BRT = num_tokens_BRS.flip(-1).diff(dim=-1)
    gain_BRT = (score_BRS.flip(-1).diff(dim=-1) / cost_BRT.clamp(min=1)).cummin(dim=-1).values
    gain_BRT = torch.where(num_tokens_BRS[..., -1:] > 0, gain_BRT, -torch.inf)
    left_B = budget_B - num_tokens_BRS[..., -1].sum(dim=1)
    taken_BX, price_B = _spend(gain_BRT.flatten(1), cost_BRT.flatten(1), left_B)
    taken_BRT = taken_BX.unflatten(1, gain_BRT.shape[1:])
    left_B = left_B - (taken_BRT * cost_BRT).sum(dim=(1, 2))
    step_BR = taken_BRT.sum(dim=-1)
    next_BR1 = step_BR.clamp(max=coarsest - 1).unsqueeze(-1)
    next_cost_BR, next_gain_BR = cost_BRT.gather(2, next_BR1).squeeze(-1), gain_BRT.gather(2, next_BR1).squeeze(-1)
    fits_BR = (step_BR < coarsest) & (next_cost_BR <= left_B.unsqueeze(1))
    more_BR, _ = _spend(torch.where(fits_BR, next_gain_BR, -torch.inf), next_cost_BR, left_B)
    return coarsest - step_BR - (more_BR & fits_BR).long(), price_B


def _spend(gain_BX: Tensor, cost_BX: Tensor, left_B: Tensor) -> tuple[Tensor, Tensor]:
    """Take steps in descending order of gain until a step costs more than is left.

    Returns:
        Mask of the steps taken, (B, X) bool, and the gain of the first step not taken, (B,); 0 if its gain is -inf.
    """
    sorted_BX, order_BX = gain_BX.sort(dim=1, descending=True, stable=True)
    fits_BX = cost_BX.gather(1, order_BX).cumsum(dim=1) <= left_B.unsqueeze(1)
    # Costs are at least 0, so the steps that fit come first; a negative rest fits none, even at no cost.
    refused_B1 = fits_BX.sum(dim=1, keepdim=True)
    price_B = nn.functional.pad(sorted_BX, (0, 1), value=-torch.inf).gather(1, refused_B1).squeeze(1)
    taken_BX = torch.zeros_like(fits_BX).scatter(1, order_BX, fits_BX)
    return taken_BX, torch.where(price_B.isinf(), 0, price_B)


def region_statistics(patch_BRNC: Tensor, seen_BRN: Tensor) -> Tensor:
    """Return mean and variance of each region's real patches, (B, R, 2 C), at least float32; 0 for empty regions."""
    dtype = accumulation_dtype(patch_BRNC.dtype)
    seen_BRN1 = seen_BRN.unsqueeze(-1)
    count_BR1 = seen_BRN1.sum(dim=2).clamp(min=1)
    real_BRNC = torch.where(seen_BRN1, patch_BRNC.to(dtype), 0)
    mean_BRC = real_BRNC.sum(dim=2) / count_BR1
    apart_BRNC = torch.where(seen_BRN1, real_BRNC - mean_BRC.unsqueeze(2), 0)
    return torch.cat([mean_BRC, apart_BRNC.square().sum(dim=2) / count_BR1], dim=-1)


def _straight_through(probability_BRS: Tensor, choice_BR: Tensor) -> Tensor:
    """Return factors (B, R) with value 1 and the gradient of the chosen scale's probability."""
    chosen_BR = probability_BRS.gather(2, choice_BR.unsqueeze(-1)).squeeze(-1)
    return 1 + (chosen_BR - chosen_BR.detach())


def _choose(
    cells: Sequence[tuple[Tensor, Tensor]], choice_BR: Tensor, factor_BR: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Collect each region's cells at the chosen scale without gaps: tokens (B, K, C) and mask (B, K) bool."""
    token_BRJC, is_token_BRJ = cells[0]
    for number, (mean_BRJC, is_cell_BRJ) in enumerate(cells[1:], start=1):
        chosen_BR1 = (choice_BR == number).unsqueeze(-1)
        token_BRJC = torch.where(chosen_BR1.unsqueeze(-1), mean_BRJC, token_BRJC)
        is_token_BRJ = torch.where(chosen_BR1, is_cell_BRJ, is_token_BRJ)
    token_BRJC = token_BRJC * factor_BR[..., None, None].to(token_BRJC.dtype)
    flat_BK = is_token_BRJ.flatten(1)
    # A stable sort moves real tokens to the front and keeps their order.
    first_BK = flat_BK.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :num_slots]
    return gather_rows(token_BRJC.flatten(1, 2), first_BK), flat_BK.gather(1, first_BK)


def check_scales(region: int, scales: object) -> None:
    """Raise SettingsError unless scales are ascending divisors of the region's side."""
    good = (
        isinstance(scales, list | tuple)
        and len(scales) > 0
        and all(
            isinstance(side, int) and not isinstance(side, bool) and side > 0 and region % side == 0 for side in scales
        )
        and list(scales) == sorted(set(scales))
    )
    if not good:
        raise SettingsError(
            f"scales is {scales!r}; it must list divisors of region={region}, ascending, for example [1, 2, 4]."
        )


def check_target(target_keep: float, scales: Sequence[int]) -> None:
    """Raise SettingsError unless the scales can reach the share."""
    least, most = 1 / scales[-1] ** 2, 1 / scales[0] ** 2
    if not least <= target_keep <= most:
        raise SettingsError(
            f"target_keep is {target_keep:g}, but scales {list(scales)} keep a share from {least:g} to {most:g}; change one of "
            "the two."
        )
