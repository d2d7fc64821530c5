"""TokenPacker (single layer) against loops over queries and their windows, and its properties in a batch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from meteor.errors import SettingsError
from meteor.image.budget import visual_token_budget
from meteor.projector import Projector, ProjectorOutput, build_projector
from meteor.projector.tokenpacker import down_sample, square_windows, token_bound

Array = np.ndarray
GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3), (9, 4)]
sides, factors = st.integers(1, 30), st.integers(1, 7)


def make_projector(scale_factor: int = 2, *, vision_width: int = 16) -> Projector:
    """Every weight random, so that each one counts."""
    torch.manual_seed(0)
    projector = build_projector("tokenpacker", vision_width=vision_width, llm_width=24, scale_factor=scale_factor)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(std=0.5)
    return projector


def project(projector: Projector, batch: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids)


def count_tokens(grid: tuple[int, int], scale_factor: int = 2) -> int:
    return math.ceil(grid[0] / scale_factor) * math.ceil(grid[1] / scale_factor)


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def norm(row: Array, weight: Array, bias: Array) -> Array:
    centred = row - row.mean()
    return centred / np.sqrt(centred.var() + 1e-5) * weight + bias


def interpolate(features: Array, grid: tuple[int, int], size: tuple[int, int]) -> Array:
    map_CHW = torch.from_numpy(features).T.unflatten(1, grid)
    return F.interpolate(map_CHW.unsqueeze(0), size, mode="bilinear").flatten(2)[0].T.numpy()


def pack(weights: dict[str, Array], features: Array, grid: tuple[int, int], scale_factor: int, heads: int) -> Array:
    """One sub-image, one query, one patch, one head at a time."""

    def linear(name: str, row: Array) -> Array:
        return weights[f"{name}.weight"] @ row + weights.get(f"{name}.bias", 0.0)

    def layer_norm(name: str, row: Array) -> Array:
        return norm(row, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def detail(name: str, row: Array) -> Array:
        return layer_norm(f"{name}.3", linear(f"{name}.2", gelu(linear(f"{name}.0", row))))

    columns, width = math.ceil(grid[1] / scale_factor), features.shape[1]
    size = (math.ceil(grid[0] / scale_factor), columns)
    tokens = []
    for number, coarse in enumerate(interpolate(features, grid, size)):
        r, c = divmod(number, columns)
        query = linear("attention.query", layer_norm("to_queries.1", linear("to_queries.0", coarse)))
        window = [
            features[y * grid[1] + x]
            for y in range(r * scale_factor, min((r + 1) * scale_factor, grid[0]))
            for x in range(c * scale_factor, min((c + 1) * scale_factor, grid[1]))
        ]
        keys = np.array([linear("attention.key", detail("to_keys", row)) for row in window])
        values = np.array([linear("attention.value", detail("to_values", row)) for row in window])
        attended = np.zeros(width)
        for head in np.split(np.arange(width), heads):
            share = np.exp(keys[:, head] @ query[head] / math.sqrt(len(head)))
            attended[head] = share @ values[:, head] / share.sum()
        tokens.append(linear("mlp.2", gelu(linear("mlp.0", linear("attention.output", attended)))))
    return np.array(tokens)


@pytest.mark.parametrize(("vision_width", "heads"), [(16, 8), (12, 6)])
@pytest.mark.parametrize("scale_factor", [1, 2, 3, 20])
def test_tokens_are_those_of_loops_over_queries_and_their_windows(
    scale_factor: int, vision_width: int, heads: int, make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(scale_factor, vision_width=vision_width).double()
    batch = make_sub_images(*GRIDS, width=vision_width, dtype=torch.float64)
    output = project(projector, batch.with_padding(math.nan))
    weights = {name: value.numpy() for name, value in projector.state_dict().items()}
    assert output.indices is output.visual_scores is output.native_scores is output.aux_loss is None
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        expected = pack(weights, batch.features[number, :count].numpy(), grid, scale_factor, heads)
        tokens, real = output.tokens[number].detach(), len(expected)
        assert output.mask[number].tolist() == [True] * real + [False] * (len(tokens) - real)
        torch.testing.assert_close(tokens[:real].numpy(), expected)
        assert not tokens[real:].any()


def test_windows_of_an_odd_map_by_hand() -> None:
    window, seen = square_windows(torch.tensor([[3, 3], [1, 2]]), 2, 5)
    held = [
        [patches[there].tolist() for patches, there in zip(*one, strict=True)] for one in zip(window, seen, strict=True)
    ]
    assert held == [[[0, 1, 3, 4], [2, 5], [6, 7], [8], []], [[0, 1], [], [], [], []]]


@given(rows=sides, columns=sides, factor=factors)
def test_down_sampling_is_bilinear_interpolation(rows: int, columns: int, factor: int) -> None:
    grid, size = (rows, columns), (math.ceil(rows / factor), math.ceil(columns / factor))
    features = torch.randn(1, rows * columns, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = down_sample(features, torch.tensor([grid]), factor, size[0] * size[1] + 3)
    torch.testing.assert_close(got[0, :-3].numpy(), interpolate(features[0].numpy(), grid, size))
    assert got.isfinite().all()


@given(rows=sides, columns=sides, factor=factors)
def test_no_map_makes_more_tokens_than_there_are_slots(rows: int, columns: int, factor: int) -> None:
    assert count_tokens((rows, columns), factor) <= token_bound(rows * columns, factor)
    assert count_tokens((1, columns), factor) == token_bound(columns, factor)


@given(grids=st.lists(st.tuples(sides, sides), min_size=1, max_size=5), factor=factors)
def test_the_budget_is_the_number_of_real_tokens(grids: list[tuple[int, int]], factor: int) -> None:
    projector = build_projector("tokenpacker", vision_width=2, llm_width=2, scale_factor=factor)
    num_patches = max(rows * columns for rows, columns in grids)
    with torch.inference_mode():
        output = projector(
            torch.zeros(len(grids), num_patches, 2), torch.zeros(len(grids), num_patches), torch.tensor(grids)
        )
    assert output.mask.sum(dim=1).tolist() == visual_token_budget("tokenpacker", {"scale_factor": factor})(grids)


def test_its_number_of_parameters() -> None:
    """Queries C^2; keys and values 2 x 2 (C^2 + C); three LayerNorms 6 C; attention 4 C^2 + 4 C: 9 C^2 + 14 C =
    9,451,520 at C = 1024. The MLP: C D + D + D^2 + D = 31,467,520 at D = 5120.

    With four blocks the first Linear of keys and of values is 4 C wide, 2 x 3 C^2 = 6,291,456 more: the original's count.
    """
    with torch.device("meta"):
        projector = build_projector("tokenpacker", vision_width=1024, llm_width=5120)
    count = sum(parameter.numel() for parameter in projector.parameters())
    assert count == 9_451_520 + 31_467_520 == 40_919_040
    assert count + 6_291_456 == 47_210_496
    assert projector.attention.num_heads == 8


def test_it_compiles_into_one_graph(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector(), make_sub_images(*GRIDS)
    compiled = torch.compile(projector, backend="eager", fullgraph=True)
    got, expected = project(compiled, batch), project(projector, batch)
    assert torch.equal(got.tokens[got.mask], expected.tokens[expected.mask])
    # Eagerly there is room for the most tokens of any map; a graph has room for a strip as large as the largest map.
    assert expected.mask.all(dim=1).any()
    assert got.tokens.shape[1] == token_bound(batch.features.shape[1], projector.scale_factor)


@pytest.mark.parametrize("scale_factor", [0, True, 2.0, "2"])
def test_a_scale_factor_that_is_no_count_is_refused(scale_factor: object) -> None:
    with pytest.raises(SettingsError, match="scale_factor is"):
        build_projector("tokenpacker", vision_width=16, llm_width=8, scale_factor=scale_factor)
