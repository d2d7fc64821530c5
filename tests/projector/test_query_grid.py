"""Grids of queries: their shape, their windows, and both ways to attend."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meteor.projector.query_grid import GridAttention, most_heads, most_square_grid, pooling_windows

sides = st.integers(1, 30)


@pytest.mark.parametrize(
    ("count", "grid"), [(144, (12, 12)), (64, (8, 8)), (32, (4, 8)), (48, (6, 8)), (7, (1, 7)), (1, (1, 1))]
)
def test_a_grid_is_as_square_as_its_count_allows(count: int, grid: tuple[int, int]) -> None:
    assert most_square_grid(count) == grid


@pytest.mark.parametrize(
    ("width", "limit", "heads"), [(5120, 40, 40), (4096, 32, 32), (1024, 8, 8), (20, 8, 5), (7, 4, 1), (24, 0, 1)]
)
def test_as_many_heads_as_divide_the_width(width: int, limit: int, heads: int) -> None:
    assert most_heads(width, limit) == heads


@given(rows=sides, columns=sides, grid=st.tuples(st.integers(1, 13), st.integers(1, 13)), padding=st.integers(0, 40))
def test_pooling_windows_are_those_of_the_definition(
    rows: int, columns: int, grid: tuple[int, int], padding: int
) -> None:
    num_patches = rows * columns + padding
    seen = pooling_windows(torch.tensor([[rows, columns]]), grid, num_patches)[0]
    assert seen.shape == (grid[0] * grid[1], num_patches)
    for query in {0, len(seen) // 2, len(seen) - 1}:
        r, c = divmod(query, grid[1])
        window = [
            y * columns + x
            for y in range(math.floor(r * rows / grid[0]), math.ceil((r + 1) * rows / grid[0]))
            for x in range(math.floor(c * columns / grid[1]), math.ceil((c + 1) * columns / grid[1]))
        ]
        assert window == seen[query].nonzero().flatten().tolist() != []
    assert seen[:, : rows * columns].any(dim=0).all()


def make_attention(width: int = 12, heads: int = 3) -> tuple[GridAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same random weights, in float64."""
    torch.manual_seed(0)
    ours, theirs = GridAttention(width, heads).double(), nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        maps = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([linear.weight for linear in maps]))
        theirs.in_proj_bias.copy_(torch.cat([linear.bias for linear in maps]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    return ours, theirs


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_both_ways_to_attend_give_what_torchs_multi_head_attention_gives() -> None:
    ours, theirs = make_attention()
    query, key, value = random_rows(2, 5, 12), random_rows(2, 7, 12), random_rows(2, 7, 12)
    window = torch.stack([torch.stack([torch.randperm(7)[:4] for _ in range(5)]) for _ in range(2)])
    inside = torch.rand(2, 5, 4) < 0.6
    inside[..., 0] = True
    seen = torch.zeros(2, 5, 7, dtype=torch.bool).scatter(2, window, inside)
    expected, _ = theirs(query, key, value, attn_mask=~seen.repeat_interleave(3, dim=0))
    torch.testing.assert_close(ours(query, key, value, seen), expected)
    torch.testing.assert_close(ours.over_windows(query, key, value, window, inside), expected)


def test_a_query_that_sees_nothing_is_finite_and_so_are_gradients() -> None:
    ours, _ = make_attention()
    window = torch.zeros(1, 2, 3, dtype=torch.long)
    attended = ours.over_windows(
        random_rows(1, 2, 12), random_rows(1, 4, 12), random_rows(1, 4, 12), window, window.bool()
    )
    attended.square().sum().backward()
    assert attended.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("attend", [GridAttention.forward, GridAttention.over_windows])
def test_half_precision_is_off_by_no_more_than_its_rounding(attend: Callable[..., Any]) -> None:
    """Logits 128, 128.375 and 128.47: bf16 knows none between 128 and 129, and would make their shares equal."""
    ours, _ = make_attention(width=64, heads=1)
    with torch.no_grad():
        for linear in (ours.query, ours.key, ours.value, ours.output):
            linear.weight.copy_(torch.eye(64))
            linear.bias.zero_()
    query = torch.full((1, 1, 64), 2.0, dtype=torch.float64)
    key = torch.full((1, 3, 64), 8.0, dtype=torch.float64)
    key[0, 1, 0], key[0, 2, 0] = 9.5, 9.875
    value = random_rows(1, 3, 64)
    ones = torch.ones(1, 1, 3, dtype=torch.bool)
    seen = (ones,) if attend is GridAttention.forward else (torch.arange(3).view(1, 1, 3), ones)
    expected = attend(ours, query, key, value, *seen)
    got = attend(ours.bfloat16(), query.bfloat16(), key.bfloat16(), value.bfloat16(), *seen)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
