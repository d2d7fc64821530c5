"""The plain controls: pooling, the global view alone, blocks folded into channels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from meteor.errors import SettingsError
from meteor.projector import build_projector
from meteor.projector.plain import fold_blocks
from meteor.projector.pooling import pool_maps

GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (9, 4)]
sides = st.integers(1, 25)


@given(rows=sides, columns=sides, pooled=st.tuples(st.integers(1, 13), st.integers(1, 13)), padding=st.integers(0, 9))
def test_pooling_is_torchs_adaptive_average(rows: int, columns: int, pooled: tuple[int, int], padding: int) -> None:
    maps = torch.randn(1, rows * columns + padding, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(maps[0, : rows * columns].T.unflatten(1, (rows, columns)), pooled).flatten(1).T
    torch.testing.assert_close(pool_maps(maps, torch.tensor([[rows, columns]]), pooled)[0], expected)


def test_average_pooling_goes_through_the_mlp(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images(*GRIDS)
    projector = build_projector("avg_pool", vision_width=16, llm_width=8, grid=3)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    for number, (grid, count) in enumerate(zip(GRIDS, batch.num_patches, strict=True)):
        pooled = F.adaptive_avg_pool2d(batch.features[number, :count].T.unflatten(1, grid), (3, 3)).flatten(1).T
        torch.testing.assert_close(output.tokens[number], projector.mlp(pooled))
    assert output.mask.all()
    assert output.indices is None


def test_a_block_is_its_patches_one_after_the_other_and_zeros_beyond_the_map() -> None:
    """A 3 x 3 map of one channel, numbers 1 to 9."""
    folded, mask = fold_blocks(torch.arange(1.0, 10).view(1, 9, 1), torch.tensor([[3, 3]]), 2)
    assert folded.tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]
    assert mask.all()


@given(rows=sides, columns=sides, factor=st.integers(1, 4))
def test_unfolding_gives_the_map_back(rows: int, columns: int, factor: int) -> None:
    features = torch.randn(1, rows * columns, 2, generator=torch.Generator().manual_seed(1))
    folded, mask = fold_blocks(features, torch.tensor([[rows, columns]]), factor)
    block_rows, block_columns = -(-rows // factor), -(-columns // factor)
    assert folded.shape[1] == block_rows * block_columns == mask.sum()
    blocks = folded[0].view(block_rows, block_columns, factor, factor, 2).transpose(1, 2)
    unfolded = blocks.reshape(block_rows * factor, block_columns * factor, 2)[:rows, :columns]
    assert torch.equal(unfolded.reshape(-1, 2), features[0])


def test_folded_blocks_go_through_norm_and_mlp(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((4, 4))
    projector = build_projector("pixel_shuffle", vision_width=16, llm_width=8)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    # torch's own has a channel's four places together; ours a place's channels.
    theirs = F.pixel_unshuffle(batch.features[0].T.unflatten(1, (4, 4)), 2).unflatten(0, (16, 4)).transpose(0, 1)
    expected = projector.mlp(projector.norm(theirs.flatten(0, 1).flatten(1).T))
    torch.testing.assert_close(output.tokens[0], expected)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("avg_pool", "grid", 0), ("ldpv2", "grid", 1.5), ("pixel_shuffle", "scale_factor", True)],
)
def test_a_setting_that_is_no_count_is_refused(name: str, setting: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{setting} is"):
        build_projector(name, vision_width=16, llm_width=8, **{setting: value})
