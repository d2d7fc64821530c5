"""A small cache, and projectors trained on it."""

from collections.abc import Callable

import pytest
import torch

from meteor.cache import (
    CacheIdentity,
    FeatureCache,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.model import MeteorForConditionalGeneration
from meteor.model.trained_projector import TrainedProjector, load_trained_projector, projector_metadata
from meteor.projector.file import write_projector_file

KEYS = [letter * 64 for letter in "abdef"]


@pytest.fixture
def make_cache(make_features, make_model, tmp_path) -> Callable[..., FeatureCache]:
    """Five images of one or three sub-images, and one that is quarantined."""

    def make(codec: str = "float16", keys=KEYS, **changes: object) -> FeatureCache:
        identity = CacheIdentity.from_dict({**make_model().config.cache_identity, **changes})
        uri = create_cache(str(tmp_path / "caches"), identity, codec)
        images = [make_features(key, sliced=i % 2 == 1, seed=i) for i, key in enumerate(keys)]
        write_feature_file(uri, [encode_row(image, get_codec(codec)) for image in images])
        record_quarantine(uri, [QuarantineRow("c" * 64, "odd.jpg", "truncated", "the file ends early")])
        commit(uri)
        return FeatureCache.open(uri)

    return make


@pytest.fixture
def trained(make_model, tmp_path) -> Callable[..., tuple[MeteorForConditionalGeneration, TrainedProjector]]:
    """A model and its projector as read from the file that pretrain leaves."""

    def make(
        settings: dict | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[MeteorForConditionalGeneration, TrainedProjector]:
        model = make_model(settings or {"name": "meteor", "k": 3}, seed=seed).eval()
        with torch.no_grad():
            # Or the native scores would be nearly even.
            for name, parameter in model.projector.named_parameters():
                if name == "instruction":
                    parameter.mul_(200)
        uri = str(tmp_path / "projector.safetensors")
        write_projector_file(uri, model.projector.state_dict(), projector_metadata(model.config))
        return model, load_trained_projector(uri, device="cpu", dtype=dtype)

    return make
