"""First half of a bidirectional scan in plain torch: rows in visiting order, causal convolution, SiLU.

Letters: B sub-images, P patches, M = P + 1 rows (tokens, then INS), K rows of a table ([TL, if any | T | INS]), L scan
steps, E scan channels per direction, W = 2 E, X channels of the rows: E if the directions share them, otherwise W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from meteor.ssm.scan_order import ScanOrder
from meteor.ssm.tensors import gather_rows


def visit_rows(
    row_BMX: Tensor, summary_BPX: Tensor | None, order: ScanOrder, weight_W1K: Tensor, bias_W: Tensor
) -> Tensor:
    """Return SiLU(conv(rows in visiting order)) for both directions.

    Args:
        row_BMX: rows T_1 ... T_P and INS, (B, M, X). If X = W, each direction has its own half.
        summary_BPX: local summaries TL, (B, P, X); None if the order visits none.
        order: visiting orders of both directions.
        weight_W1K: weight of a causal depth-wise convolution, (W, 1, taps).
        bias_W: bias of the convolution, (W,).

    Returns:
        The visited rows, (B, L, W), the forward direction's channels first.
    """
    table_BKX = row_BMX if summary_BPX is None else torch.cat([summary_BPX, row_BMX], dim=1)
    # Orders are indices into [TL | T | INS]; without summaries the table starts at T, P rows later.
    rows_B2L = order.rows if summary_BPX is not None else order.rows - (row_BMX.shape[1] - 1)
    width = len(bias_W) // 2
    tables = table_BKX.split(width, dim=-1) if table_BKX.shape[-1] == len(bias_W) else (table_BKX, table_BKX)
    visited_BLW = torch.cat(
        [gather_rows(table, rows_BL) for table, rows_BL in zip(tables, rows_B2L.unbind(1), strict=True)], dim=-1
    )
    padded_BWL = F.pad(visited_BLW.transpose(1, 2), (weight_W1K.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded_BWL, weight_W1K, bias_W, groups=len(bias_W))).transpose(1, 2)
