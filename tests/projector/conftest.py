"""Batches of sub-images with different maps, for the tests of this room."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class SubImages:
    """A padded batch, as a projector takes it."""

    features: Tensor
    cls_attention: Tensor
    grids: Tensor

    @property
    def num_patches(self) -> list[int]:
        return self.grids.prod(dim=1).tolist()

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.features.shape[1]) < self.grids.prod(dim=1, keepdim=True)

    def alone(self, number: int) -> "SubImages":
        """One sub-image without padding."""
        count = self.num_patches[number]
        one = slice(number, number + 1)
        return SubImages(self.features[one, :count], self.cls_attention[one, :count], self.grids[one])

    def with_padding(self, value: float) -> "SubImages":
        return SubImages(
            torch.where(self.mask.unsqueeze(-1), self.features, value),
            torch.where(self.mask, self.cls_attention, value),
            self.grids,
        )


@pytest.fixture
def make_sub_images() -> Callable[..., SubImages]:
    def make(
        *grids: tuple[int, int], width: int = 16, max_patches: int | None = None, dtype: torch.dtype = torch.float32
    ) -> SubImages:
        generator = torch.Generator().manual_seed(3)
        num_patches = max_patches or max(rows * columns for rows, columns in grids)
        features = torch.randn(len(grids), num_patches, width, generator=generator, dtype=torch.float64)
        cls_attention = torch.rand(len(grids), num_patches, generator=generator, dtype=torch.float64) / num_patches
        return SubImages(features.to(dtype), cls_attention.to(dtype), torch.tensor(grids))

    return make
