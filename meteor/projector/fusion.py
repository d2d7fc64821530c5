"""Flash Global Fusion: every token gets its whole sub-image as context, in time linear in the number of tokens.

Letters: B sub-images, P patches, M = P + 1 rows (tokens, then INS), X token width.
"""

import torch
from torch import Tensor, nn

from meteor.projector.checks import check_choice, check_count
from meteor.ssm import BidirectionalSSM, scan_order

WINDOWS = (3, 5, 7)
LOCAL_SUMMARIES = ("mean", "conv")
# Visiting orders (modes of `meteor.ssm.scan_order`) that each value of the setting `scan` runs over.
SCANS = {
    "single": ("single",),
    "local_to_single": ("local_to_single",),
    "both": ("single", "local_to_single"),
}


class FlashGlobalFusion(nn.Module):
    """Pre-norm, local-to-single bidirectional scan and residual (LLaVA-Meteor, section 3.2, equations 1 and 2).

    The paper does not say from which tokens the local summary is computed; here it is computed from the normalised,
    projected tokens. The input projection has no bias, so the mean of projected tokens equals the projected mean, and P rows
    are projected instead of 2 P. The depth-wise convolution (``local="conv"``) takes the place of the mean. With
    ``scan="both"`` both sequences run through the same parameters, and their outputs are summed.

    Args:
        width: token width, X.
        inner_width: number of channels of each direction's scan.
        state_size: size of the scan state.
        dt_rank: rank of Delta's projection; ``ceil(width / 16)`` if None.
        window: side of the local window in patches, 3, 5 or 7.
        local: operation that summarises a window, ``"mean"`` or ``"conv"``.
        scan: visiting order, ``"single"``, ``"local_to_single"`` or ``"both"``.
        shared_projections: whether the two directions share input and output projection.
        affine_norm: whether the LayerNorm has weight and bias.
        scan_backend: backend of the scan, see `meteor.ssm.selective_scan`.

    Raises:
        SettingsError: a setting has a value that is not listed above.
    """

    def __init__(
        self,
        width: int,
        *,
        inner_width: int,
        state_size: int = 16,
        dt_rank: int | None = None,
        window: int = 3,
        local: str = "mean",
        scan: str = "local_to_single",
        shared_projections: bool = True,
        affine_norm: bool = True,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("window", window, WINDOWS)
        check_choice("local", local, LOCAL_SUMMARIES)
        check_choice("scan", scan, SCANS)
        check_count("state_size", state_size)
        self.modes = SCANS[scan]
        self.norm = nn.LayerNorm(width, elementwise_affine=affine_norm)
        self.ssm = BidirectionalSSM(
            width,
            inner_width=inner_width,
            state_size=state_size,
            dt_rank=dt_rank,
            shared_projections=shared_projections,
            window=window if "local_to_single" in self.modes else None,
            local=local,
            backend=scan_backend,
        )

    def forward(
        self, token_BPX: Tensor, instruction_1X: Tensor, mask_BP: Tensor, grids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fuse the tokens of each sub-image with each other and with the instruction token.

        Args:
            token_BPX: tokens, (B, P, X); finite at padding, where the values have no effect.
            instruction_1X: instruction token INS, (1, X), shared by all sub-images.
            mask_BP: mask of patches, (B, P) bool, True at real patches.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.

        Returns:
            Fused tokens F, (B, P, X), meaningless at padding, and INS after the scan, (B, X).
        """
        num_sub_images, max_patches, width = token_BPX.shape
        row_BMX = torch.cat([token_BPX, instruction_1X.expand(num_sub_images, 1, width)], dim=1)
        num_patches_B = mask_BP.sum(dim=1)
        orders = [scan_order(num_patches_B, max_patches, mode) for mode in self.modes]
        out_BMX = row_BMX + self.ssm(self.norm(row_BMX), grids, orders)
        return out_BMX[:, :-1], out_BMX[:, -1]
