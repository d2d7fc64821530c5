"""Tensor operations that scans and projectors share: rows by index, and the dtype for accumulation.

Letters: B sub-images, N rows of a table, M rows taken, X channels.
"""

import torch
from torch import Tensor


def gather_rows(table_BNX: Tensor, index_BM: Tensor) -> Tensor:
    """Take rows from each sub-image's own table.

    Args:
        table_BNX: tables, (B, N, X).
        index_BM: row numbers, (B, M) long, each in [0, N).

    Returns:
        The rows, (B, M, X).
    """
    num_tables, num_rows, width = table_BNX.shape
    # One index_select over all rows. torch.gather with an expanded index takes twice as long on a CPU, both forward and
    # backward.
    offset_B1 = torch.arange(num_tables, device=index_BM.device).unsqueeze(1) * num_rows
    row_RX = table_BNX.reshape(num_tables * num_rows, width).index_select(0, (index_BM + offset_B1).flatten())
    return row_RX.reshape(num_tables, index_BM.shape[1], width)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scans and reductions: float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
