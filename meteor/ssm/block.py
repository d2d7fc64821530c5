"""The bidirectional state-space block: shared projections around two directional scans that run as one.

Letters: B sub-images, P patches, M = P + 1 rows (tokens, then INS), K rows of a table ([TL, if any | T | INS]), L scan
steps, X width of the tokens, E scan channels of a direction, W channels of both directions or of a projection, N scan
state, R rank of Delta.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.ssm.backends import resolve_backend, selective_scan
from meteor.ssm.scan_order import ScanIndex
from meteor.ssm.tensors import accumulation_dtype, gather_rows

# Mamba's initialisation of Delta: softplus(bias) is log-uniform in [DT_MIN, DT_MAX].
DT_MIN = 1e-3
DT_MAX = 0.1
NUM_DIRECTIONS = 2


class SelectiveProjection(nn.Module):
    """What makes a scan selective: Delta (without its bias), B and C from the input itself."""

    def __init__(self, inner_width: int, *, state_size: int, dt_rank: int) -> None:
        super().__init__()
        self.sizes = [dt_rank, state_size, state_size]
        self.x_proj = nn.Linear(inner_width, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner_width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)

    def forward(self, u_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return delta (B, L, E), B (B, L, N) and C (B, L, N) for the scan's input (B, L, E)."""
        dt_BLR, B_BLN, C_BLN = self.x_proj(u_BLE).split(self.sizes, dim=-1)
        return self.dt_proj(dt_BLR), B_BLN, C_BLN


class BidirectionalScan(nn.Module):
    """A forward and a backward scan, each with its own convolution, Delta, B, C, A and D, in one call of 2 E channels.

    Channels come direction by direction: the first E of every parameter are the forward scan's. As two groups of B and
    C in one scan they halve the number of scan launches, and the steps of a loop in Python.

    Args:
        inner_width: E.
        state_size: N.
        conv_width: taps of the causal depth-wise convolution.
        dt_rank: R.
        backend: scan backend, see `meteor.ssm.selective_scan`.

    Raises:
        SettingsError: no such backend.
    """

    def __init__(self, inner_width: int, *, state_size: int, conv_width: int, dt_rank: int, backend: str) -> None:
        super().__init__()
        resolve_backend(backend)
        self.inner_width = inner_width
        self.backend = backend
        width = NUM_DIRECTIONS * inner_width
        self.conv = nn.Conv1d(width, width, conv_width, groups=width, padding=conv_width - 1)
        self.selective = nn.ModuleList(
            SelectiveProjection(inner_width, state_size=state_size, dt_rank=dt_rank) for _ in range(NUM_DIRECTIONS)
        )
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.dt_bias = nn.Parameter(_initial_dt_bias(width))

    def forward(
        self, forward_BKE: Tensor, backward_BKE: Tensor, forward_index: ScanIndex, backward_index: ScanIndex
    ) -> tuple[Tensor, Tensor]:
        """Visit the rows in each direction's order and return what stands at the tokens and at INS.

        Args:
            forward_BKE: (B, K, E), the rows that ``forward_index.order`` points into.
            backward_BKE: the same for the backward direction; may be the same tensor.
            forward_index: visiting order of the forward scan.
            backward_index: visiting order of the backward scan.

        Returns:
            Two tensors (B, M, E), forward and backward: the outputs at T_1 ... T_P and INS. Rows of padding are
            meaningless and finite. The outputs are not gated.
        """
        rows_BLW = torch.cat(
            [
                gather_rows(forward_BKE, forward_index.order),
                gather_rows(backward_BKE, backward_index.order),
            ],
            dim=-1,
        )
        y_BLW = self._scan(rows_BLW)
        # Padding stands after the last real step of either order, where a causal scan cannot carry it back: no mask on
        # Delta is needed for a mixed batch to equal each sub-image alone.
        forward_BLE, backward_BLE = y_BLW.split(self.inner_width, dim=-1)
        return (
            gather_rows(forward_BLE, _read_positions(forward_index)),
            gather_rows(backward_BLE, _read_positions(backward_index)),
        )

    def _scan(self, rows_BLW: Tensor) -> Tensor:
        """Convolution, SiLU and selective scan of both directions' channels, (B, L, 2 E) to the same."""
        num_steps = rows_BLW.shape[1]
        u_BWL = F.silu(self.conv(rows_BLW.transpose(1, 2))[..., :num_steps])
        u_BLW = u_BWL.transpose(1, 2)
        deltas, Bs, Cs = zip(
            *(project(u_BLE) for project, u_BLE in zip(self.selective, u_BLW.split(self.inner_width, -1), strict=True)),
            strict=True,
        )
        # DeepSpeed keeps these three in bf16 with everything else; exp and softplus need more than its 8 bits.
        dtype = accumulation_dtype(self.A_log.dtype)
        y_BWL = selective_scan(
            u_BWL,
            torch.cat(deltas, dim=-1).transpose(1, 2),
            -torch.exp(self.A_log.to(dtype)),
            torch.stack([B_BLN.transpose(1, 2) for B_BLN in Bs], dim=1),
            torch.stack([C_BLN.transpose(1, 2) for C_BLN in Cs], dim=1),
            self.D.to(dtype),
            delta_bias=self.dt_bias.to(dtype),
            delta_softplus=True,
            backend=self.backend,
        )
        return y_BWL.transpose(1, 2)


class BidirectionalSSM(nn.Module):
    """Input projection, two directional scans, their mean, SiLU gate, output projection (LLaVA-Meteor, section 3.2).

    The paper is silent on the layout. With ``shared_projections`` the two directions read one input projection and meet
    before one gate and one output projection. Without, each direction is a whole Mamba block, and the mean is taken of
    the blocks' outputs. A mean, not a sum: summing has been seen to give NaNs in low precision.

    Args:
        width: X.
        inner_width: E, channels of each direction's scan.
        state_size: N.
        conv_width: taps of the causal convolution.
        dt_rank: R; ``ceil(width / 16)`` when None, as in Mamba.
        shared_projections: whether the directions share the projections.
        backend: scan backend, see `meteor.ssm.selective_scan`.

    Raises:
        SettingsError: no such backend.
    """

    def __init__(
        self,
        width: int,
        *,
        inner_width: int,
        state_size: int = 16,
        conv_width: int = 4,
        dt_rank: int | None = None,
        shared_projections: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.shared_projections = shared_projections
        self.projected_width = inner_width if shared_projections else NUM_DIRECTIONS * inner_width
        self.in_proj = nn.Linear(width, 2 * self.projected_width, bias=False)
        self.scan = BidirectionalScan(
            inner_width,
            state_size=state_size,
            conv_width=conv_width,
            dt_rank=math.ceil(width / 16) if dt_rank is None else dt_rank,
            backend=backend,
        )
        self.out_proj = nn.Linear(self.projected_width, width, bias=False)

    def forward(
        self,
        row_BMX: Tensor,
        summarise: Callable[[Tensor], Tensor] | None,
        indices: Sequence[tuple[ScanIndex, ScanIndex]],
    ) -> Tensor:
        """Give every token and INS the context of their sub-image.

        Args:
            row_BMX: (B, M, X), the tokens T_1 ... T_P and, last, INS.
            summarise: projected tokens (B, P, projected_width) to their local summaries TL, of the same shape; None
                when no order visits a TL.
            indices: (forward, backward) orders, one pair for each scan to run. All run with the same parameters, and
                their outputs are summed.

        Returns:
            (B, M, X), without residual.
        """
        x_BMW, z_BMW = self.in_proj(row_BMX).chunk(2, dim=-1)
        table_BKW = x_BMW if summarise is None else torch.cat([summarise(x_BMW[:, :-1]), x_BMW], dim=1)
        tables = (table_BKW, table_BKW) if self.shared_projections else table_BKW.chunk(NUM_DIRECTIONS, dim=-1)
        # Orders point into [TL | T | INS]; without summaries the table starts at T.
        num_absent_rows = 0 if summarise is not None else row_BMX.shape[1] - 1
        outputs: list[Tensor] = []
        for forward_index, backward_index in indices:
            forward_BME, backward_BME = self.scan(
                *tables, _moved(forward_index, num_absent_rows), _moved(backward_index, num_absent_rows)
            )
            outputs.append(self._join(forward_BME, backward_BME))
        y_BMW = sum(outputs[1:], outputs[0])
        return self.out_proj(y_BMW * F.silu(z_BMW))

    def _join(self, forward_BME: Tensor, backward_BME: Tensor) -> Tensor:
        """The mean of the directions; of separate blocks, their halves side by side, which out_proj adds up."""
        if self.shared_projections:
            return (forward_BME + backward_BME) / NUM_DIRECTIONS
        return torch.cat([forward_BME, backward_BME], dim=-1) / NUM_DIRECTIONS


def _moved(index: ScanIndex, num_rows: int) -> ScanIndex:
    return index._replace(order=index.order - num_rows)


def _read_positions(index: ScanIndex) -> Tensor:
    return torch.cat([index.token_steps, index.instruction_step.unsqueeze(1)], dim=1)


def _initial_dt_bias(width: int) -> Tensor:
    dt_W = torch.exp(torch.rand(width) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN))
    # The inverse of softplus.
    return dt_W + torch.log(-torch.expm1(-dt_W))
