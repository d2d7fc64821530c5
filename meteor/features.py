"""Value types that vision, cache, data and model share: the features of an image, and a source of features.

Letters: P patches of a sub-image, C vision width, A attention layers, S sub-images of the image.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from meteor.errors import CacheError


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of one image from the frozen encoder; sub-images are the global view, then the slices row by row.

    Attributes:
        image_key: sha256 of the image file's bytes.
        width, height: pixels of the image as a viewer shows it.
        grid: columns and rows of the slices; None without slices.
        patch_grids: patch rows and columns (Hu, Wu) of each sub-image.
        attention_layers: indices of the hidden states whose block's attention is in ``cls_attention``.
        features: patch features of each sub-image, (P, C).
        cls_attention: importance rows of each sub-image, (A, P) float32: attention of the class token over the patches, or the
            row that the encoder has in its place.
        cls: class tokens of all sub-images, (S, C); the patches' mean if the encoder has no class token.

    Raises:
        CacheError: the shapes contradict each other.
    """

    image_key: str
    width: int
    height: int
    grid: tuple[int, int] | None
    patch_grids: tuple[tuple[int, int], ...]
    attention_layers: tuple[int, ...]
    features: list[torch.Tensor]
    cls_attention: list[torch.Tensor]
    cls: torch.Tensor

    def __post_init__(self) -> None:
        num_slices = self.grid[0] * self.grid[1] if self.grid else 0
        if len(self.patch_grids) != 1 + num_slices:
            raise CacheError(f"image {self.image_key}: grid {self.grid} contradicts the patch grids {self.patch_grids}")
        num_patches = [rows * columns for rows, columns in self.patch_grids]
        vision_width, num_layers = self.cls.shape[-1], len(self.attention_layers)
        self._check_shapes("features", self.features, [(count, vision_width) for count in num_patches])
        self._check_shapes("cls_attention", self.cls_attention, [(num_layers, count) for count in num_patches])
        self._check_shapes("cls", [self.cls], [(len(num_patches), vision_width)])

    def _check_shapes(self, name: str, tensors: Sequence[torch.Tensor], wanted: Sequence[tuple[int, int]]) -> None:
        if (found := [tuple(tensor.shape) for tensor in tensors]) != wanted:
            raise CacheError(f"image {self.image_key}: {name} must have the shapes {wanted}, got {found}")

    @property
    def num_sub_images(self) -> int:
        """Number of sub-images, S."""
        return len(self.patch_grids)

    def with_attention(self, layers: Sequence[int]) -> "ImageFeatures":
        """Return a copy with the attention of ``layers`` alone, in that order.

        Raises:
            CacheError: a layer was not cached.
        """
        if missing := [layer for layer in layers if layer not in self.attention_layers]:
            raise CacheError(
                f"image {self.image_key}: the cache holds the attention of layers {list(self.attention_layers)}, "
                f"not of {missing}; run cache_features with vision.attention_layers containing them"
            )
        rows = [self.attention_layers.index(layer) for layer in layers]
        attention = [attention_AP[rows] for attention_AP in self.cls_attention]
        return replace(self, attention_layers=tuple(layers), cls_attention=attention)


class FeatureSource(Protocol):
    """Source of features for training and evaluation: a `FeatureCache` or `LiveFeatures`."""

    def get(self, image_key: str) -> ImageFeatures: ...

    def prefetch(
        self, keys: Iterable[str], *, num_threads: int = ..., max_bytes: int = ...
    ) -> Generator[ImageFeatures, None, None]: ...
