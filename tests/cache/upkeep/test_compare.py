"""Two caches side by side: what differs is named, what cannot be compared is not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meteor.cache import FeatureCache, calibrate, commit, create_cache, encode_row, open_codec, write_feature_file
from meteor.cache.upkeep.compare import diff_caches
from meteor.features import ImageFeatures


@pytest.fixture
def make_cache(make_identity, tmp_path: Path) -> Callable[..., FeatureCache]:
    def make(
        name: str,
        *images: ImageFeatures,
        codec: str = "float16",
        calibrated_on: ImageFeatures | None = None,
        **identity: object,
    ) -> FeatureCache:
        uri = create_cache(str(tmp_path / name), make_identity(**identity), codec)
        calibrate(uri, [calibrated_on] if calibrated_on else images)
        write_feature_file(uri, [encode_row(image, open_codec(uri)) for image in images])
        commit(uri)
        return FeatureCache.open(uri)

    return make


def shifted(image: ImageFeatures) -> ImageFeatures:
    return replace(image, features=[part + 0.25 for part in image.features])


def test_equal_caches_have_no_difference_whatever_the_order_of_their_files(make_cache, make_image) -> None:
    images = [make_image(str(i), shape=i) for i in range(4)]
    diff = diff_caches(make_cache("a", *images), make_cache("b", *images[::-1]))
    assert diff.equal
    assert (diff.num_common, diff.other_numbers) == (4, ())
    assert "no difference" in diff.to_text()


def test_every_kind_of_difference_is_told_apart(make_cache, make_image) -> None:
    same, moved, wide = make_image("same"), make_image("moved"), make_image("wide")
    a = make_cache("a", same, moved, wide, make_image("a1"), make_image("a2"))
    b = make_cache("b", same, shifted(moved), make_image("wide", layers=(-2, -5)), make_image("b1"))
    diff = diff_caches(a, b)
    assert diff.identity == ()
    assert diff.num_common == 3
    assert list(diff.only_in_a) == sorted(make_image(name).image_key for name in ("a1", "a2"))
    assert diff.only_in_b == (make_image("b1").image_key,)
    assert diff.other_layers == (wide.image_key,)
    assert diff.other_numbers == (moved.image_key,)
    assert not diff.equal
    text = diff.to_text()
    assert f"2 only in a: {', '.join(diff.only_in_a)}" in text
    assert f"1 with other numbers from the same settings, as other hardware gives: {moved.image_key}" in text
    assert json.loads(json.dumps(diff.to_dict()))["other_layers"] == [wide.image_key]
    back = diff_caches(b, a)
    assert (back.only_in_a, back.only_in_b, back.other_numbers) == (diff.only_in_b, diff.only_in_a, diff.other_numbers)


def test_numbers_of_other_settings_or_codecs_are_not_compared(make_cache, make_image) -> None:
    image = make_image("a")
    a = make_cache("a", image)
    other_layer = diff_caches(a, make_cache("b", image, select_layer=-1))
    assert other_layer.identity == ("select_layer: -2 != -1",)
    assert other_layer.other_numbers is None
    assert "select_layer: -2 != -1" in other_layer.to_text()
    assert "numbers were not compared" in other_layer.to_text()
    other_codec = diff_caches(a, make_cache("a", image, codec="float32"))
    assert other_codec.codecs == ("float16", "float32")
    assert other_codec.other_numbers is None
    assert not other_codec.equal


def test_two_calibrations_of_one_codec_are_two_codecs(make_cache, make_image) -> None:
    images = [make_image("a"), make_image("b")]
    wider = replace(images[0], features=[torch.cat([part * 9 for part in images[0].features])])
    a = make_cache("a", *images, codec="int8")
    assert diff_caches(a, make_cache("b", *images, codec="int8")).equal
    diff = diff_caches(a, make_cache("c", *images, codec="int8", calibrated_on=wider))
    assert diff.codecs[0] != diff.codecs[1]
    assert diff.other_numbers is None


def test_only_the_first_few_keys_are_shown(make_cache, make_image) -> None:
    many = [make_image(str(i)) for i in range(8)]
    diff = diff_caches(make_cache("a", *many), make_cache("b", make_image("x")))
    assert diff.num_common == 0
    assert f"8 only in a: {', '.join(sorted(image.image_key for image in many)[:5])}, ..." in diff.to_text()
