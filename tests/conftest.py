"""Fixtures that several rooms share: a tiny model without training, and batches for it."""

from collections.abc import Callable

import pytest
import torch

from meteor.cache import ImageFeatures
from meteor.data.collate import Batch, collate
from meteor.image.budget import visual_token_budget
from meteor.model import MeteorConfig, MeteorForConditionalGeneration
from meteor.text.tokens import Separators, TokenisedSample

IDENTITY = {
    "encoder_digest": "0" * 64,
    "select_layer": -2,
    "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
    "slicing": {"max_slices": 6, "resolution": 56, "patch_size": 14},
    "versions": {"slicing": 1, "resizing": 1, "encoding": 1},
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MeteorForConditionalGeneration]:
    def make(projector: dict | None = None, *, seed: int = 0, vision_tower: bool = False) -> MeteorForConditionalGeneration:
        torch.manual_seed(seed)
        config = MeteorConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            projector=projector or {"name": "meteor", "k": 4},
            cache_identity=IDENTITY,
        )
        return MeteorForConditionalGeneration(config, vision_tower=vision_tower)

    return make


@pytest.fixture(scope="session")
def make_features() -> Callable[..., ImageFeatures]:
    def make(key: str, *, sliced: bool = False, width: int = 16, seed: int = 0) -> ImageFeatures:
        generator = torch.Generator().manual_seed(seed)
        grids = ((2, 3), (3, 2), (3, 2)) if sliced else ((2, 4),)
        sizes = [rows * columns for rows, columns in grids]
        return ImageFeatures(
            image_key=key,
            width=100,
            height=80,
            grid=(2, 1) if sliced else None,
            patch_grids=grids,
            attention_layers=(-2,),
            features=[torch.randn(n, width, generator=generator) for n in sizes],
            cls_attention=[torch.rand(1, n, generator=generator) / n for n in sizes],
            cls=torch.randn(len(grids), width, generator=generator),
        )

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    def make(samples: list[tuple[TokenisedSample, list[ImageFeatures]]], projector: dict | None = None, **options) -> Batch:
        settings = dict(projector or {"name": "meteor", "k": 4})
        return collate(
            samples,
            budget=visual_token_budget(settings.pop("name"), settings),
            separators=Separators(slice_id=3, row_id=4),
            pad_id=0,
            vision_width=16,
            select_layer=-2,
            **options,
        )

    return make
