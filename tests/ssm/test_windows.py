"""Local summaries against loops over rows, columns and neighbours, on maps of different shapes in one batch."""

import pytest
import torch
from torch import Tensor

from meteor.ssm.windows import PatchMaps, WindowConv, WindowMean

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3)]


def make_tokens(*grids: tuple[int, int], width: int = 3) -> tuple[Tensor, PatchMaps]:
    """Random tokens of sub-images padded to the largest, and their maps."""
    num_patches = max(rows * columns for rows, columns in grids)
    tokens = torch.randn(len(grids), num_patches, width, generator=torch.Generator().manual_seed(3)).double()
    return tokens, PatchMaps.of(torch.tensor(grids), num_patches, tokens.device)


def make_neighbours(rows: int, columns: int, patch: int, window: int) -> list[tuple[int, int]]:
    """(patch, place in the window) of every token inside the map around a patch."""
    half = window // 2
    row, column = divmod(patch, columns)
    return [
        ((row + down) * columns + column + right, (down + half) * window + right + half)
        for down in range(-half, half + 1)
        for right in range(-half, half + 1)
        if 0 <= row + down < rows and 0 <= column + right < columns
    ]


@pytest.mark.parametrize("window", [3, 5, 7])
def test_the_mean_counts_only_tokens_inside_the_map(window: int) -> None:
    tokens, maps = make_tokens(*GRIDS)
    summary_BPX = WindowMean(window)(tokens, maps)
    for number, (rows, columns) in enumerate(GRIDS):
        for patch in range(rows * columns):
            inside = [one for one, _ in make_neighbours(rows, columns, patch, window)]
            expected = sum(tokens[number, one] for one in inside) / len(inside)
            torch.testing.assert_close(summary_BPX[number, patch], expected)


@pytest.mark.parametrize("window", [3, 5, 7])
def test_the_convolution_sees_zeros_outside_the_map(window: int) -> None:
    tokens, maps = make_tokens(*GRIDS)
    local = WindowConv(3, window).double()
    torch.nn.init.normal_(local.weight)
    summary_BPX = local(tokens, maps)
    weight_XW = local.weight.flatten(1)
    for number, (rows, columns) in enumerate(GRIDS):
        for patch in range(rows * columns):
            around = make_neighbours(rows, columns, patch, window)
            expected = sum(tokens[number, one] * weight_XW[:, place] for one, place in around)
            torch.testing.assert_close(summary_BPX[number, patch], expected)


def test_a_new_convolution_is_the_mean_where_the_window_is_full() -> None:
    tokens, maps = make_tokens((5, 5))
    mean, conv = WindowMean(3)(tokens, maps), WindowConv(3, 3).double()(tokens, maps)
    inner = [6, 7, 8, 11, 12, 13, 16, 17, 18]
    torch.testing.assert_close(conv[:, inner], mean[:, inner])


def test_the_gradient_of_a_mean_goes_to_the_tokens_of_its_window() -> None:
    tokens, maps = make_tokens((3, 4), (2, 2))
    WindowMean(3)(tokens.requires_grad_(), maps)[1, 0].sum().backward()
    expected = torch.zeros(2, 12).double()
    expected[1, :4] = 1 / 4
    torch.testing.assert_close(tokens.grad, expected.unsqueeze(-1).expand(-1, -1, 3))


def test_the_mean_of_bf16_tokens_is_rounded_once() -> None:
    tokens: Tensor = torch.tensor([[256.0], [1.0], [4.0]]).bfloat16().unsqueeze(0)
    maps = PatchMaps.of(torch.tensor([[1, 3]]), 3, tokens.device)
    summary = WindowMean(3)(tokens, maps)
    assert summary.dtype == torch.bfloat16
    # The sum of the three is 261, which bf16 rounds to 260: the mean would be 86.5.
    assert summary[0, 1].item() == 87
