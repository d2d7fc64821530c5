"""Projectors with convolutions or learned queries, each sub-image against torch's own layers on its map alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meteor.errors import SettingsError
from meteor.projector import Projector, build_projector
from meteor.projector.c_abstractor import RegBlock, interpolate_table
from meteor.projector.llava_mini import _middle
from meteor.projector.positions import map_positions

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (9, 4)]
sides = st.integers(1, 30)


def make_projector(name: str, **settings: Any) -> Projector:
    torch.manual_seed(0)
    projector = build_projector(name, vision_width=16, llm_width=24, **settings).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return projector


def to_map(token_PX: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, X, Hu, Wu)."""
    return token_PX.T.unflatten(1, grid).unsqueeze(0)


def to_rows(map_1XHW: Tensor) -> Tensor:
    return map_1XHW.flatten(2)[0].T


def test_ldpv2_is_torchs_layers_on_each_map(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector("ldpv2", grid=3), make_sub_images(*GRIDS, dtype=torch.float64)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        pooled = F.adaptive_avg_pool2d(to_map(projector.mlp(batch.features[number, :count]), grid), (3, 3))
        layer = projector.positions
        around = F.conv2d(pooled, layer.weight, layer.bias, padding=1, groups=24)
        torch.testing.assert_close(output.tokens[number], to_rows(pooled + around))


def regnet_block(block: RegBlock, maps: Tensor) -> Tensor:
    """On (1, C, H, W), by convolutions."""

    def norm(layer: nn.Module, one: Tensor) -> Tensor:
        return layer(one.movedim(1, -1)).movedim(-1, 1)

    width = maps.shape[1]
    hidden = F.silu(norm(block.norms[0], F.conv2d(maps, block.enter.weight[..., None, None])))
    around = F.conv2d(hidden, block.neighbours.weight.unsqueeze(1), padding=1, groups=width)
    hidden = F.silu(norm(block.norms[1], around))
    squeezed = F.silu(block.squeeze(hidden.mean(dim=(2, 3))))
    hidden = hidden * block.excite(squeezed).sigmoid()[..., None, None]
    return F.silu(norm(block.norms[2], F.conv2d(hidden, block.leave.weight[..., None, None])) + maps)


def test_the_c_abstractor_is_torchs_convolutions_on_each_map(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector("c_abstractor", grid=3), make_sub_images(*GRIDS, dtype=torch.float64)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        table = F.interpolate(to_map(projector.positions, (24, 24)), grid, mode="bilinear")
        maps = to_map(batch.features[number, :count], grid) + table
        for block in projector.before:
            maps = regnet_block(block, maps)
        maps = F.adaptive_avg_pool2d(maps, (3, 3))
        for block in projector.after:
            maps = regnet_block(block, maps)
        torch.testing.assert_close(output.tokens[number], projector.readout(to_rows(maps)))


@given(rows=sides, columns=sides)
def test_positions_of_other_maps_are_bilinearly_interpolated(rows: int, columns: int) -> None:
    table = torch.randn(24 * 24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = interpolate_table(table, torch.tensor([[rows, columns]]), rows * columns + 3)
    expected = to_rows(F.interpolate(to_map(table, (24, 24)), (rows, columns), mode="bilinear"))
    torch.testing.assert_close(got[0, :-3], expected)
    assert got.isfinite().all()


def test_the_c_abstractors_number_of_parameters() -> None:
    """A block: 2 C^2, depth-wise 9 C, three LayerNorms 6 C, squeeze and excitation 2 C C / 4 + C / 4 + C = 2,638,080 at
    C = 1024. Six of them, the table 576 C = 589,824, and the readout as large as the MLP's 31,467,520."""
    with torch.device("meta"):
        projector = build_projector("c_abstractor", vision_width=1024, llm_width=5120)
    count = sum(parameter.numel() for parameter in projector.parameters())
    assert count == 6 * 2_638_080 + 589_824 + 31_467_520 == 47_885_824


def test_llava_minis_queries_attend_to_the_whole_map(make_sub_images: Callable[..., Any]) -> None:
    projector, batch = make_projector("llava_mini", grid=2), make_sub_images(*GRIDS, dtype=torch.float64)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    mine, theirs = projector.attention, nn.MultiheadAttention(16, 8, batch_first=True).double()
    with torch.no_grad():
        maps = (mine.query, mine.key, mine.value)
        theirs.in_proj_weight.copy_(torch.cat([one.weight for one in maps]))
        theirs.in_proj_bias.copy_(torch.cat([one.bias for one in maps]))
        theirs.out_proj.load_state_dict(mine.output.state_dict())

    def positions(places: list[tuple[int, int]]) -> Tensor:
        row, column = torch.tensor(places).T
        return map_positions(row, column, width=16, num_coordinates=40, dtype=torch.float64)

    for number, ((rows, columns), count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        value = batch.features[number : number + 1, :count]
        key = value + positions([(r, c) for r in range(rows) for c in range(columns)])
        middles = [(int((r + 0.5) * rows / 2), int((c + 0.5) * columns / 2)) for r in range(2) for c in range(2)]
        attended, _ = theirs((projector.queries + positions(middles)).unsqueeze(0), key, value)
        torch.testing.assert_close(output.tokens[number], projector.mlp(attended[0]))


def test_the_only_query_of_a_full_map_stands_in_its_middle() -> None:
    assert _middle(torch.tensor([0]), torch.tensor([[24]]), 1).tolist() == [[12]]


@pytest.mark.parametrize("value", [0, True, "2"])
@pytest.mark.parametrize("name", ["c_abstractor", "llava_mini"])
def test_a_grid_that_is_no_count_is_refused(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match="grid is"):
        build_projector(name, vision_width=16, llm_width=8, grid=value)


def test_llava_mini_refuses_a_width_without_room_for_positions() -> None:
    with pytest.raises(SettingsError, match="not 6"):
        build_projector("llava_mini", vision_width=6, llm_width=8)
