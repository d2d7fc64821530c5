"""FocusLLaVA-style vision-guided sampler: a gate chooses the scale at which each region of the map is kept.

Letters: B sub-images, P patches, R regions, N patches per region, S scales, J cells per region at the finest scale,
K tokens, C vision width, D LLM width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meteor.errors import SettingsError
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
    cells of s x s patches. A gate (Linear, GELU, Linear) maps the mean and variance of the region's patches to a softmax over
    scales, and the most likely scale is taken. Its tokens are multiplied by 1 + p - stop_gradient(p), so that the gate
    learns (straight-through). Patches beyond the map are ignored; a cell without patches gives no token. The two-layer MLP
    follows. The projector has 31,992,835 parameters at C = 1024, D = 5120.

    The auxiliary loss is the mean over sub-images of (share - target_keep)^2, with share = tokens kept / patches. Its
    gradient is that of the expected share under the gate's probabilities.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        region: side of a region in patches.
        scales: sides of the cells in patches, ascending divisors of the region's side.
        gate_width: width of the gate's hidden layer.
        target_keep: share of tokens to keep, towards which the auxiliary loss pulls every sub-image, in [0, 1].

    Raises:
        SettingsError: a setting has a value out of its range.
    """

    def __init__(
        self,
        vision_width: int,
        llm_width: int,
        *,
        region: int = 4,
        scales: Sequence[int] = (1, 2, 4),
        gate_width: int = 256,
        target_keep: float = 0.5,
    ) -> None:
        super().__init__()
        check_count("region", region)
        check_count("gate_width", gate_width)
        check_fraction("target_keep", target_keep)
        check_scales(region, scales)
        self.vision_width, self.region, self.scales, self.target_keep = vision_width, region, tuple(scales), target_keep
        self.gate = nn.Sequential(
            nn.Linear(2 * vision_width, gate_width), nn.GELU(), nn.Linear(gate_width, len(scales))
        )
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, K, D) in the order of regions, row by row in each; K is the number at the finest scale.

        `Projector` describes the arguments. ``aux_loss`` is 0 for B = 0.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        grids, max_patches = grids.to(mask_BP.device).long(), mask_BP.shape[1]
        window_BRN, seen_BRN = square_windows(grids, self.region, most_tokens(grids, max_patches, self.region))
        patch_BRNC = gather_rows(feature_BPC, window_BRN.flatten(1)).unflatten(1, window_BRN.shape[1:])
        probability_BRS = self.gate(region_statistics(patch_BRNC, seen_BRN).to(dtype)).float().softmax(dim=-1)
        choice_BR = probability_BRS.argmax(dim=-1)
        cells = [self._cells(patch_BRNC, seen_BRN, scale) for scale in self.scales]
        num_slots = most_tokens(grids, max_patches, self.scales[0])
        token_BKC, mask_BK = _choose(cells, choice_BR, _straight_through(probability_BRS, choice_BR), num_slots)
        num_tokens_BRS = torch.stack([is_cell_BRJ.sum(dim=-1) for _, is_cell_BRJ in cells], dim=-1)
        return ProjectorOutput(
            tokens=torch.where(mask_BK.unsqueeze(-1), self.mlp(token_BKC), 0),
            mask=mask_BK,
            aux_loss=self._load(probability_BRS, choice_BR, num_tokens_BRS, mask_BP.sum(dim=1)),
        )

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

    def _load(
        self, probability_BRS: Tensor, choice_BR: Tensor, num_tokens_BRS: Tensor, num_patches_B: Tensor
    ) -> Tensor:
        """Return the auxiliary loss, 0-d float32."""
        expected_B = (probability_BRS * num_tokens_BRS).sum(dim=(1, 2)) / num_patches_B.clamp(min=1)
        kept_B = num_tokens_BRS.gather(2, choice_BR.unsqueeze(-1)).sum(dim=(1, 2)) / num_patches_B.clamp(min=1)
        share_B = kept_B + (expected_B - expected_B.detach())
        return (share_B - self.target_keep).square().sum() / max(len(share_B), 1)


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
