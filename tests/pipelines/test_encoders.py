"""Encoders other than CLIP through the pipelines, with generated images: the cache, and the model that is trained from it."""

import json
from pathlib import Path

import pytest
import torch
from eager_towers import TINY, eager, make_model

from meteor.assembly import Inputs
from meteor.assembly.places import pixel_settings
from meteor.assembly.training_stage import find_model
from meteor.image.pixels import slice_bytes
from meteor.image.transform import normalise
from meteor.model import MeteorForConditionalGeneration
from pipelines import cache_features, evaluate, finetune, pretrain

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_once"), pytest.mark.slow]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module", params=["siglip2_naflex", "dinov2_registers"])
def encoder(request, tmp_path_factory):
    """Name, folder, and model of a tiny tower with an image processor that resizes bilinearly."""
    config_class, shape = TINY[request.param]
    folder = tmp_path_factory.mktemp("encoders") / request.param
    # The spread of a new model: with a larger one, outlier channels hide errors of float16.
    model = make_model(config_class(**shape), spread=0.02)
    model.save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return request.param, str(folder), model


def settings_for(make_settings, folder, **changes):
    # Patch size, resolution and resize filter are the encoder's.
    return make_settings(slicing={"max_slices": 2, "resolution": None}, vision={"path": folder}, **changes)


def test_the_cache_holds_what_transformers_computes_for_the_sliced_image(make_settings, encoder):
    name, folder, model = encoder
    settings = settings_for(make_settings, folder)
    summary = cache_features.run(Inputs(settings))
    assert summary.counts["quarantined"] == 0
    inputs = Inputs(settings)
    cache = inputs.cache()
    expected = ("pooling_query", 64, 16) if name == "siglip2_naflex" else ("class_token", 70, 14)
    slicing = cache.identity.slicing
    assert (cache.identity.importance, slicing["resolution"], slicing["patch_size"]) == expected
    assert cache.identity.resample == "bilinear"
    rows = {row.image_key: row for row in inputs.index().rows()}
    assert len(cache) == len(rows)
    for key, row in list(rows.items())[:3]:
        sliced = slice_bytes(Path(row.uri).read_bytes(), key, pixel_settings(settings))
        truths = eager(model, [normalise(sub_image, MEAN, STD) for sub_image in sliced.sub_images])
        got = cache.get(key)
        assert got.patch_grids == sliced.plan.patch_grids
        for features, attention, truth in zip(got.features, got.cls_attention, truths, strict=True):
            torch.testing.assert_close(features.float(), truth.hidden[-2], rtol=2**-10, atol=2**-12)
            torch.testing.assert_close(attention[0], truth.row(expected[0], 2), rtol=1e-4, atol=1e-6)


def test_a_model_is_trained_from_the_cache_and_answers_with_its_own_tower(make_settings, encoder):
    _, folder, model = encoder
    settings = settings_for(make_settings, folder)
    for stage in (cache_features, pretrain, finetune, evaluate):
        summary = stage.run(Inputs(settings))
    assert summary.counts["questions"] == 8
    inputs = Inputs(settings)
    finished = MeteorForConditionalGeneration.from_pretrained(find_model(inputs)[0])
    assert finished.config.vision_config.model_type == model.config.model_type
    tower = finished.frozen_encoder()
    assert tower.importance == inputs.cache_identity().importance
    pixels = [torch.randn(3, 3 * tower.patch_size, 4 * tower.patch_size)]
    (got,), (truth,) = tower.encode(pixels), eager(model, pixels)
    torch.testing.assert_close(got.features, truth.hidden[-2])
    torch.testing.assert_close(got.cls_attention[0], truth.row(tower.importance, 2))
