"""The audit against errors that were put in by hand."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, open_codec, write_feature_file
from meteor.data.audit import audit_cache, compare_features, rank_correlation
from meteor.errors import CacheError, DataError
from meteor.features import ImageFeatures


class Fresh:
    """Gives images from memory where the audit would encode."""

    def __init__(self, images: Mapping[str, ImageFeatures]) -> None:
        self.images = images

    def get(self, image_key: str) -> ImageFeatures:
        if image_key not in self.images:
            raise DataError(f"{image_key} is gone")
        return self.images[image_key]


@pytest.fixture
def images(make_features: Callable[..., ImageFeatures]) -> dict[str, ImageFeatures]:
    made = [make_features(letter * 64, sliced=letter > "b", seed=i) for i, letter in enumerate("abcd")]
    return {image.image_key: image for image in made}


@pytest.fixture
def cache(images: dict[str, ImageFeatures], tmp_path) -> FeatureCache:
    identity = CacheIdentity(
        encoder_digest="e" * 64,
        encoder_dtype="float32",
        select_layer=-2,
        preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
        slicing={"max_slices": 6, "resolution": 56, "patch_size": 14},
    )
    uri = create_cache(str(tmp_path), identity, "float32")
    write_feature_file(uri, [encode_row(image, open_codec(uri)) for image in images.values()])
    commit(uri)
    return FeatureCache.open(uri)


def audit(cache: FeatureCache, images: Mapping[str, ImageFeatures], **options):
    uris = dict.fromkeys(cache.keys(), "file")
    return audit_cache(cache, Fresh(images), uris, **{"num_images": 10, "tolerance": 0.02, **options})


def test_the_same_numbers_pass_with_no_error_at_all(cache, images) -> None:
    result = audit(cache, images)
    assert result.failed == []
    assert result.to_dict()["worst"]["relative_error"] == 0.0
    assert result.to_dict()["worst"]["min_cosine"] == pytest.approx(1.0)
    assert [one.image_key for one in result.images] == cache.keys()
    assert "passed" in result.to_text()


def test_an_image_that_differs_is_named_with_its_error(cache, images) -> None:
    key = "b" * 64
    changed = replace(images[key], features=[part * 1.1 for part in images[key].features])
    result = audit(cache, {**images, key: changed})
    (failed,) = result.failed
    assert failed.image_key == key
    assert failed.relative_error == pytest.approx(0.1 / 1.1, rel=1e-5)
    assert failed.max_error == pytest.approx(0.1 * float(torch.cat(images[key].features).abs().max()), rel=1e-5)
    assert f"{key}: relative error 0.0909" in result.to_text()
    assert audit(cache, {**images, key: changed}, tolerance=0.1).failed == []


def test_features_that_are_not_numbers_fail(cache, images) -> None:
    key = "a" * 64
    broken = replace(images[key], features=[part * float("nan") for part in images[key].features])
    assert [one.image_key for one in audit(cache, {**images, key: broken}).failed] == [key]


def test_an_image_that_is_gone_is_a_failure_with_its_reason(cache, images) -> None:
    gone = {key: image for key, image in images.items() if key != "c" * 64}
    (failed,) = audit(cache, gone).failed
    assert "gone" in failed.problem


def test_the_sample_is_the_same_each_time_and_changes_with_the_seed(cache, images) -> None:
    def chosen(seed: int) -> list[str]:
        return [one.image_key for one in audit(cache, images, num_images=2, seed=seed).images]

    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 1


def test_images_without_a_known_file_are_left_out(cache, images) -> None:
    one = audit_cache(cache, Fresh(images), {"a" * 64: "file"}, num_images=9, tolerance=0.1)
    assert [shown.image_key for shown in one.images] == ["a" * 64]
    with pytest.raises(CacheError, match="none of the 4 images"):
        audit_cache(cache, Fresh(images), {}, num_images=9, tolerance=0.1)


def test_rank_correlation_by_hand() -> None:
    one = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert rank_correlation(one, one * 100 + 3) == 1.0
    assert rank_correlation(one, -one) == -1.0
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(one, torch.tensor([0.2, 0.1, 0.3, 0.4])) == pytest.approx(0.8)
    assert rank_correlation(one[:1], one[1:2]) == 1.0


def test_rank_agreement_is_the_worst_of_all_sub_images(images) -> None:
    image = images["c" * 64]
    turned = [*image.cls_attention[:-1], image.cls_attention[-1] * -1]
    assert compare_features(replace(image, cls_attention=turned), image).rank_agreement == -1.0
