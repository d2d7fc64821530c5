"""Bidirectional state-space block: shared projections around two directional scans that run as one.

Letters: B sub-images, P patches, M = P + 1 rows (tokens, then INS), L scan steps, X token width, E scan channels per
direction, G = 2 directions, W = G E channels of both directions or of a projection, N scan state, R rank of Delta.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.ssm.backends import check_backend, resolve_backend, selective_scan
from meteor.ssm.scan_order import ScanOrder
from meteor.ssm.tensors import accumulation_dtype, gather_rows
from meteor.ssm.visit import visit_rows
from meteor.ssm.windows import PatchMaps, WindowConv, WindowMean

# Mamba's initialisation of Delta: softplus(bias) is log-uniform in [DT_MIN, DT_MAX].
DT_MIN = 1e-3
DT_MAX = 0.1
NUM_DIRECTIONS = 2
CONV_WIDTH = 4


class BidirectionalScan(nn.Module):
    """Forward and backward scan in one call of 2 E channels, each with its own convolution, Delta, B, C, A and D.

    Channels come direction by direction: the first E channels of every parameter belong to the forward scan. As two groups
    of B and C in one scan, the directions need half as many scan launches.

    Args:
        inner_width: number of scan channels per direction, E.
        state_size: size of the scan state, N.
        dt_rank: rank of Delta's projection, R.
        local: module that computes local summaries TL from tokens (B, P, ...); None if no order visits them.
        backend: scan backend, see `meteor.ssm.selective_scan`.

    Raises:
        SettingsError: the backend does not exist.
        MissingPackageError: the backend's package is absent.
    """

    def __init__(
        self,
        inner_width: int,
        *,
        state_size: int,
        dt_rank: int,
        local: WindowMean | WindowConv | None,
        backend: str,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.inner_width = inner_width
        self.local = local
        self.backend = backend
        width = NUM_DIRECTIONS * inner_width
        # The causal depth-wise convolution of Mamba's block, with its four taps.
        self.conv = nn.Conv1d(width, width, CONV_WIDTH, groups=width)
        self.sizes = [dt_rank, state_size, state_size]
        self.x_proj = nn.Parameter(_uniform(NUM_DIRECTIONS, sum(self.sizes), inner_width))
        self.dt_proj = nn.Parameter(_uniform(NUM_DIRECTIONS, inner_width, dt_rank))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.dt_bias = nn.Parameter(_initial_dt_bias(width))

    def forward(self, row_BMX: Tensor, grids: Tensor, order: ScanOrder) -> Tensor:
        """Visit the rows in each direction's order and return the scan's outputs at the tokens and at INS.

        Args:
            row_BMX: tokens T_1 ... T_P and, last, INS, (B, M, X). If X = E, both directions read the same channels; if
                X = 2 E, each direction reads its own half.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            order: visiting orders of both directions.

        Returns:
            Outputs at T_1 ... T_P and INS, (B, M, 2, E), forward before backward, not gated. Rows of padding are
            meaningless but finite.
        """
        # Padding comes after the last real step in both orders, and a causal scan cannot carry it back to real steps. A
        # mixed batch therefore equals each sub-image alone without a mask on Delta.
        backend = resolve_backend(self.backend, row_BMX)
        u_BLW = self._visit(row_BMX, grids, order, backend)
        delta_GBLE, B_GBLN, C_GBLN = self._select(u_BLW)
        # DeepSpeed keeps these three in bf16 like all weights; exp and softplus need more than its 8 bits of mantissa.
        dtype = accumulation_dtype(self.A_log.dtype)
        A_WN, D_W, bias_W = -torch.exp(self.A_log.to(dtype)), self.D.to(dtype), self.dt_bias.to(dtype)
        if backend == "triton":
            return self._scan_with_triton(u_BLW, delta_GBLE, A_WN, B_GBLN, C_GBLN, D_W, bias_W, order)
        y_BWL = selective_scan(
            u_BLW.transpose(1, 2),
            delta_GBLE.permute(1, 0, 3, 2).flatten(1, 2),
            A_WN,
            B_GBLN.permute(1, 0, 3, 2),
            C_GBLN.permute(1, 0, 3, 2),
            D_W,
            delta_bias=bias_W,
            delta_softplus=True,
            backend=backend,
        )
        outputs = y_BWL.transpose(1, 2).split(self.inner_width, dim=-1)
        read = zip(outputs, order.read_steps.unbind(1), strict=True)
        return torch.stack([gather_rows(y_BLE, steps_BM) for y_BLE, steps_BM in read], dim=2)

    def _visit(self, row_BMX: Tensor, grids: Tensor, order: ScanOrder, backend: str) -> Tensor:
        """Return the rows in visiting order after convolution and SiLU, (B, L, W)."""
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        if backend == "triton" and not isinstance(self.local, WindowConv):
            # Imported here because the module needs Triton, which a CPU machine may lack.
            from meteor.ssm.triton_visit import visit_windows

            window = self.local.window if self.local is not None else 1
            return visit_windows(row_BMX, grids, order, weight, bias, window=window)
        summary_BPX = None
        if order.has_summaries and self.local is not None:
            token_BPX = row_BMX[:, :-1]
            summary_BPX = self.local(token_BPX, PatchMaps.of(grids, token_BPX.shape[1], token_BPX.device))
        return visit_rows(row_BMX, summary_BPX, order, weight, bias)

    def _select(self, u_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the input-dependent parameters: delta without its bias (G, B, L, E), B and C (G, B, L, N)."""
        size = u_BLW.shape[:2]
        u_GRE = u_BLW.reshape(-1, NUM_DIRECTIONS, self.inner_width).transpose(0, 1)
        dt_GRR, B_GRN, C_GRN = torch.bmm(u_GRE, self.x_proj.transpose(1, 2)).split(self.sizes, dim=-1)
        delta_GRE = torch.bmm(dt_GRR, self.dt_proj.transpose(1, 2))
        return delta_GRE.unflatten(1, size), B_GRN.unflatten(1, size), C_GRN.unflatten(1, size)

    def _scan_with_triton(
        self,
        u_BLW: Tensor,
        delta_GBLE: Tensor,
        A_WN: Tensor,
        B_GBLN: Tensor,
        C_GBLN: Tensor,
        D_W: Tensor,
        bias_W: Tensor,
        order: ScanOrder,
    ) -> Tensor:
        """Run both directions in one launch that writes only the rows that are read, (B, M, G, E)."""
        from meteor.ssm.triton_scan import scan_rows

        num_rows = order.read_steps.shape[2]
        by_direction = (NUM_DIRECTIONS, -1)
        return scan_rows(
            u_BLW.unflatten(2, by_direction),
            delta_GBLE.permute(1, 2, 0, 3),
            A_WN.unflatten(0, by_direction),
            B_GBLN.permute(1, 2, 0, 3),
            C_GBLN.permute(1, 2, 0, 3),
            D_W.unflatten(0, by_direction),
            bias_W.unflatten(0, by_direction),
            softplus=True,
            result_dtype=u_BLW.dtype,
            rows_bgl=order.rows,
            num_steps_b=order.num_steps,
            # The table's first rows are TL: they only inform the tokens, and their own outputs are not read.
            first_row=num_rows - 1,
            num_rows=num_rows,
        )


class BidirectionalSSM(nn.Module):
    """Input projection, two directional scans, their mean, SiLU gate, output projection (LLaVA-Meteor, section 3.2).

    The paper does not specify the layout. With ``shared_projections`` both directions read one input projection and meet
    before one gate and one output projection. Without it, each direction is a whole Mamba block, and the blocks' outputs
    are averaged. The directions are averaged, not summed, because summing gave NaNs in low precision.

    Args:
        width: token width, X.
        inner_width: number of channels of each direction's scan, E.
        state_size: size of the scan state, N.
        dt_rank: rank of Delta's projection, R; ``ceil(width / 16)`` if None, as in Mamba.
        shared_projections: whether the directions share the input and output projections.
        window: side of the local window; None if no order visits a TL.
        local: operation that turns a window into a TL, ``"mean"`` or ``"conv"``.
        backend: scan backend, see `meteor.ssm.selective_scan`.

    Raises:
        SettingsError: the backend does not exist.
        MissingPackageError: the backend's package is absent.
    """

    def __init__(
        self,
        width: int,
        *,
        inner_width: int,
        state_size: int = 16,
        dt_rank: int | None = None,
        shared_projections: bool = True,
        window: int | None = None,
        local: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.shared_projections = shared_projections
        self.projected_width = inner_width if shared_projections else NUM_DIRECTIONS * inner_width
        self.in_proj = nn.Linear(width, 2 * self.projected_width, bias=False)
        # A scan over tokens alone reads no summaries: a convolution for them would hold parameters without gradients.
        summary: WindowMean | WindowConv | None = None
        if window is not None:
            summary = WindowMean(window) if local == "mean" else WindowConv(self.projected_width, window)
        self.scan = BidirectionalScan(
            inner_width,
            state_size=state_size,
            dt_rank=math.ceil(width / 16) if dt_rank is None else dt_rank,
            local=summary,
            backend=backend,
        )
        self.out_proj = nn.Linear(self.projected_width, width, bias=False)

    def forward(self, row_BMX: Tensor, grids: Tensor, orders: Sequence[ScanOrder]) -> Tensor:
        """Give every token and INS the context of their sub-image.

        Args:
            row_BMX: tokens T_1 ... T_P and, last, INS, (B, M, X).
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            orders: orders to scan in. All scans share the parameters, and their outputs are summed.

        Returns:
            Tokens and INS with context, (B, M, X), without the residual connection.
        """
        x_BMW, z_BMW = self.in_proj(row_BMX).chunk(2, dim=-1)
        outputs = [self._join(self.scan(x_BMW, grids, order)) for order in orders]
        return self.out_proj(sum(outputs[1:], outputs[0]) * F.silu(z_BMW))

    def _join(self, y_BMGE: Tensor) -> Tensor:
        """Average the directions; separate blocks keep their halves side by side, and out_proj adds them."""
        return y_BMGE.mean(dim=2) if self.shared_projections else y_BMGE.flatten(2) / NUM_DIRECTIONS


def _uniform(num_matrices: int, out_width: int, in_width: int) -> Tensor:
    """Draw matrices uniformly within in_width ** -0.5, the initialisation of `nn.Linear` and of Mamba's Delta projection."""
    return torch.empty(num_matrices, out_width, in_width).uniform_(-(in_width**-0.5), in_width**-0.5)


def _initial_dt_bias(width: int) -> Tensor:
    """Draw the bias of Delta so that softplus(bias) is log-uniform in [DT_MIN, DT_MAX], (W,)."""
    dt_W = torch.exp(torch.rand(width) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN))
    # The inverse of softplus.
    return dt_W + torch.log(-torch.expm1(-dt_W))
