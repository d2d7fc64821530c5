"""Rows by index, and the dtype of reductions."""

import pytest
import torch

from meteor.ssm.tensors import accumulation_dtype, gather_rows


def test_rows_come_from_each_sub_images_own_table() -> None:
    table_BNX = torch.arange(12.0).reshape(2, 3, 2)
    rows = gather_rows(table_BNX, torch.tensor([[2, 0, 0, 1], [1, 1, 2, 0]]))
    assert rows[..., 0].tolist() == [[4, 0, 0, 2], [8, 8, 10, 6]]


def test_rows_of_an_empty_batch_are_empty() -> None:
    assert gather_rows(torch.zeros(0, 3, 2), torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 2)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_accumulates_in_float32_and_float64_stays(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == expected
