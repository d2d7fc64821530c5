"""Images, identities and places to put caches, for the tests of this folder."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meteor.cache import CacheIdentity
from meteor.features import ImageFeatures

VISION_WIDTH = 6

# Grid of slices and patch grids, global view first: unsliced, two slices, a column of three.
SHAPES = [
    (None, [(2, 5)]),
    ((2, 1), [(3, 3), (4, 2), (4, 2)]),
    ((1, 3), [(5, 1), (2, 4), (2, 4), (2, 4)]),
]


@pytest.fixture
def make_identity() -> Callable[..., CacheIdentity]:
    def make(**changes) -> CacheIdentity:
        fields = {
            "encoder_digest": "e" * 64,
            "encoder_dtype": "float32",
            "select_layer": -2,
            "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25], "rescale": "1/255"},
            "slicing": {"max_slices": 6, "resolution": 336, "patch_size": 14},
            "versions": {"slicing": 1, "resizing": 1, "encoding": 1},
        }
        return CacheIdentity(**{**fields, **changes})

    return make


@pytest.fixture
def make_image() -> Callable[..., ImageFeatures]:
    """An image whose numbers follow from its name; shapes vary with ``shape``."""

    def make(name: str, *, shape: int = 0, layers: tuple[int, ...] = (-2,)) -> ImageFeatures:
        image_key = hashlib.sha256(name.encode()).hexdigest()
        numbers = torch.Generator().manual_seed(int(image_key[:8], 16))
        grid, patch_grids = SHAPES[shape % len(SHAPES)]
        num_patches = [rows * columns for rows, columns in patch_grids]
        return ImageFeatures(
            image_key=image_key,
            width=640,
            height=480 + shape,
            grid=grid,
            patch_grids=tuple(patch_grids),
            attention_layers=layers,
            features=[torch.randn(count, VISION_WIDTH, generator=numbers) for count in num_patches],
            cls_attention=[torch.rand(len(layers), count, generator=numbers) for count in num_patches],
            cls=torch.randn(len(num_patches), VISION_WIDTH, generator=numbers),
        )

    return make


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place on local disk and on S3."""
    return str(tmp_path / "root") if request.param == "disk" else request.getfixturevalue("s3_root")
