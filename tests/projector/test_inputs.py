"""What a projector refuses, and what it does to padding."""

import pytest
import torch

from meteor.projector.inputs import prepare_features

WIDTH = 4


def prepare(
    features: torch.Tensor, cls_attention: torch.Tensor, grids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return prepare_features(features, cls_attention, grids, vision_width=WIDTH, dtype=torch.float32)


def test_padding_is_zeroed_and_real_features_are_cast() -> None:
    features = torch.full((2, 6, WIDTH), torch.nan, dtype=torch.float16)
    features[0, :6] = 1
    features[1, :2] = 2
    feature_BPC, mask_BP = prepare(features, torch.zeros(2, 6), torch.tensor([[2, 3], [2, 1]]))
    assert feature_BPC.dtype == torch.float32
    assert feature_BPC[..., 0].tolist() == [[1] * 6, [2, 2, 0, 0, 0, 0]]
    assert mask_BP.tolist() == [[True] * 6, [True, True, False, False, False, False]]


@pytest.mark.parametrize(
    ("features", "cls_attention", "grids", "message"),
    [
        (torch.zeros(1, 6, 5), torch.zeros(1, 6), torch.tensor([[2, 3]]), r"features are \(1, 6, 5\)"),
        (torch.zeros(6, WIDTH), torch.zeros(1, 6), torch.tensor([[2, 3]]), r"features are \(6, 4\)"),
        (torch.zeros(1, 6, WIDTH), torch.zeros(1, 2, 6), torch.tensor([[2, 3]]), r"cls_attention is \(1, 2, 6\)"),
        (torch.zeros(1, 6, WIDTH), torch.zeros(1, 6), torch.tensor([2, 3]), r"integers \(1, 2\)"),
        (torch.zeros(1, 6, WIDTH), torch.zeros(1, 6), torch.tensor([[2.0, 3.0]]), "float32"),
        (torch.zeros(1, 6, WIDTH), torch.zeros(1, 6), torch.tensor([[3, 3]]), r"Sub-image 0 .*\(3, 3\).*at most 6"),
        (torch.zeros(1, 6, WIDTH), torch.zeros(1, 6), torch.tensor([[0, 3]]), r"\(0, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    features: torch.Tensor, cls_attention: torch.Tensor, grids: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(features, cls_attention, grids)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        *(((rows, columns), torch.int32) for rows, columns in [(0, 0), (-2, -3), (7, 1), (1, 7), (4, 2)]),
        ((2**16, 2**16), torch.int32),  # products that wrap around to 0
        ((2**62, 4), torch.int64),
    ],
)
def test_the_first_grid_that_does_not_fit_is_named(grid: tuple[int, int], dtype: torch.dtype) -> None:
    grids = torch.tensor([(2, 3), grid, (9, 9)], dtype=dtype)
    with pytest.raises(ValueError, match=rf"Sub-image 1 of the batch has the grid \({grid[0]}, {grid[1]}\)"):
        prepare(torch.zeros(3, 6, WIDTH), torch.zeros(3, 6), grids)


def test_compiled_preparation_is_one_graph_and_as_loud() -> None:
    features, attention, grids = torch.ones(2, 6, WIDTH), torch.zeros(2, 6), torch.tensor([[2, 3], [2, 1]])
    compiled = torch.compile(prepare, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(features, attention, grids), prepare(features, attention, grids), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="grid does not fit"):
        compiled(features, attention, grids * 2)
