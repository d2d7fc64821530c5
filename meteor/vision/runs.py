"""Packed rows: tokens of sub-images one after the other without padding, with sub-images of equal shape as neighbours.

Letters: N sub-images, T tokens of all sub-images, L tokens per sub-image, C vision width, H heads, Q head width, X any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch


@dataclass(frozen=True)
class Run:
    """Neighbours of equal shape in a packed row.

    Attributes:
        start: index of the run's first token.
        num: number of sub-images, N.
        length: tokens per sub-image, L.
        grid: patch rows and columns (Hu, Wu).
    """

    start: int
    num: int
    length: int
    grid: tuple[int, int]

    @property
    def end(self) -> int:
        return self.start + self.num * self.length

    def of(self, packed_TX: torch.Tensor) -> torch.Tensor:
        """Return this run's part of a packed (T, X) tensor as (N, L, X), without a copy."""
        return packed_TX[self.start : self.end].view(self.num, self.length, -1)

    def heads(self, packed_TC: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Return this run's part of a packed (T, C) tensor as (N, H, L, Q), without a copy."""
        return self.of(packed_TC).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def plan_runs(grids: Sequence[tuple[int, int]], num_prefix: int = 1) -> list[Run]:
    """Group sub-images into runs; equal grids must be neighbours. ``num_prefix`` tokens stand before each one's patches."""
    runs, start = [], 0
    for grid, same in groupby(grids):
        runs.append(Run(start, len(list(same)), num_prefix + grid[0] * grid[1], grid))
        start = runs[-1].end
    return runs


def merge_lengths(runs: Sequence[Run]) -> list[Run]:
    """Merge neighbouring runs of equal length, because attention does not depend on the grid."""
    merged: list[Run] = []
    for run in runs:
        if merged and merged[-1].length == run.length:
            merged[-1] = replace(merged[-1], num=merged[-1].num + run.num)
        else:
            merged.append(run)
    return merged
