"""Calibration: the same for the same images, published once, and no row of another one is ever served."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from meteor import storage
from meteor.cache import (
    FeatureCache,
    calibrate,
    commit,
    create_cache,
    encode_row,
    get_codec,
    needs_calibration,
    open_codec,
    write_feature_file,
)
from meteor.cache.calibration import MARGIN, calibration_bytes
from meteor.errors import CacheError
from meteor.features import ImageFeatures


@pytest.fixture
def cache_uri(make_identity, root: str) -> str:
    return create_cache(root, make_identity(), "int8")


@pytest.fixture
def images(make_image) -> list[ImageFeatures]:
    return [make_image(str(i), shape=i) for i in range(5)]


def calibration_uri(cache_uri: str) -> str:
    return storage.join(cache_uri, "calibration.json")


def not_to_be_read() -> Iterator[ImageFeatures]:
    pytest.fail("reads images although there is nothing to calibrate")
    yield


def test_the_same_images_in_any_order_give_the_same_bytes(images) -> None:
    content = calibration_bytes(images)
    assert calibration_bytes([*reversed(images), images[2]]) == content
    assert calibration_bytes(images[:-1]) != content
    fields = json.loads(content)
    assert (fields["num_images"], fields["num_sub_images"], fields["vision_width"]) == (5, 12, 6)


def test_scales_cover_the_sample_and_a_margin(images) -> None:
    fields = json.loads(calibration_bytes(images))
    values = torch.cat([part for image in images for part in image.features])
    for channel in range(6):
        low, high = float(values[:, channel].min()), float(values[:, channel].max())
        assert fields["centres"][channel] == pytest.approx((low + high) / 2, rel=1e-5)
        assert fields["scales"][channel] == pytest.approx((high - low) * (1 + 2 * MARGIN) / 254, rel=1e-5)


def test_a_calibrated_cache_serves_its_images_within_half_a_step(cache_uri, images) -> None:
    assert needs_calibration(cache_uri)
    codec = calibrate(cache_uri, images)
    assert not needs_calibration(cache_uri)
    write_feature_file(cache_uri, [encode_row(image, codec) for image in images])
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    scales = torch.tensor(storage.read_json(calibration_uri(cache_uri))["scales"])
    for image in images:
        for read_PC, feature_PC in zip(cache.get(image.image_key).features, image.features, strict=True):
            assert ((read_PC - feature_PC).abs() <= 0.5 * scales + 0.002).all()
            assert (read_PC - feature_PC).abs().max() > 0.002
    assert cache.verify() == []


def test_a_constant_channel_and_one_at_float16s_end_survive(cache_uri, make_image) -> None:
    image = make_image("a")
    image.features[0][:, 1] = -12.25
    image.features[0][:, 2] = torch.linspace(-65504, 65504, 10)
    codec = calibrate(cache_uri, [image])
    read_PC = codec.decode(bytearray(codec.encode(image.features[0])), 10, 6)
    assert read_PC[:, 1].tolist() == [-12.25] * 10
    # Also at the ends of the margin.
    assert codec.unpack(torch.tensor([[-127] * 6, [127] * 6], dtype=torch.int8)).isfinite().all()


def test_the_first_calibration_stays_and_others_get_it(cache_uri, images, make_image) -> None:
    first = calibrate(cache_uri, images)
    content = storage.read_bytes(calibration_uri(cache_uri))
    assert calibrate(cache_uri, not_to_be_read()).calibration_digest == first.calibration_digest
    assert open_codec(cache_uri).calibration_digest == first.calibration_digest
    assert storage.read_bytes(calibration_uri(cache_uri)) == content


@pytest.mark.parametrize("ignores_condition", [False, True])
def test_who_loses_the_race_takes_the_winners(
    cache_uri, images, make_image, monkeypatch, ignores_condition: bool
) -> None:
    winners = calibration_bytes([make_image("winner")])
    real = storage.create_bytes

    def race(uri: str, data: bytes) -> None:
        if ignores_condition:
            storage.write_bytes(uri, data)
        storage.write_bytes(uri, winners)
        if not ignores_condition:
            real(uri, data)

    with monkeypatch.context() as raced:
        raced.setattr(storage, "create_bytes", race)
        codec = calibrate(cache_uri, images)
    assert storage.read_bytes(calibration_uri(cache_uri)) == winners
    assert codec.calibration_digest == open_codec(cache_uri).calibration_digest


def test_codecs_without_calibration_need_nothing(make_identity, root: str) -> None:
    uri = create_cache(root, make_identity(), "float16")
    assert not needs_calibration(uri)
    assert calibrate(uri, not_to_be_read()) is get_codec("float16")
    assert open_codec(uri) is get_codec("float16")
    assert not storage.exists(calibration_uri(uri))


def test_an_uncalibrated_cache_says_so(cache_uri, make_image) -> None:
    with pytest.raises(CacheError, match=r"not calibrated.*cache_features"):
        open_codec(cache_uri)
    with pytest.raises(CacheError, match="not calibrated"):
        write_feature_file(cache_uri, [encode_row(make_image("a"), get_codec("float16"))])


def test_images_that_are_not_finite_are_left_out(cache_uri, images, make_image) -> None:
    broken, large = make_image("broken", shape=1), make_image("large")
    broken.features[1][2, 3] = float("nan")
    large.features[0][0, 0] = 1e5
    assert calibration_bytes([broken, *images, large]) == calibration_bytes(images)
    with pytest.raises(CacheError, match="none of 2"):
        calibrate(cache_uri, [broken, large])
    with pytest.raises(CacheError, match="none of 0"):
        calibrate(cache_uri, [])
    assert needs_calibration(cache_uri)


def test_images_of_two_widths_are_refused(images, make_features) -> None:
    with pytest.raises(CacheError, match=r"16 channels.* 6"):
        calibration_bytes([*images, make_features("b" * 64)])


def test_rows_of_another_calibration_are_not_published(cache_uri, images, make_image) -> None:
    old = calibrate(cache_uri, images)
    rows = [encode_row(image, old) for image in images]
    storage.write_bytes(calibration_uri(cache_uri), calibration_bytes([make_image("another's")]))
    with pytest.raises(CacheError, match=old.calibration_digest):
        write_feature_file(cache_uri, rows)
    assert commit(cache_uri) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: data.replace(b'"scales"', b'"other"'),
        lambda data: data.replace(b'"scales": [', b'"scales": [NaN,').replace(
            b'"vision_width": 6', b'"vision_width": 7'
        ),
        lambda data: data.replace(b'"vision_width": 6', b'"vision_width": 7'),
        lambda data: data.replace(b'"vision_width": 6', b'"vision_width": [6]'),
        lambda data: b"[]",
    ],
)
def test_a_damaged_calibration_is_refused(cache_uri, images, damage) -> None:
    calibrate(cache_uri, images)
    data = storage.read_bytes(calibration_uri(cache_uri))
    storage.write_bytes(calibration_uri(cache_uri), damage(data))
    with pytest.raises(CacheError, match="damaged"):
        open_codec(cache_uri)


def test_a_calibration_of_a_newer_release_is_refused(cache_uri, images) -> None:
    calibrate(cache_uri, images)
    data = storage.read_bytes(calibration_uri(cache_uri))
    storage.write_bytes(calibration_uri(cache_uri), data.replace(b'"schema_version": 1', b'"schema_version": 9'))
    with pytest.raises(CacheError, match=r"9.*newer"):
        open_codec(cache_uri)


def test_data_files_say_what_they_were_stored_by(cache_uri, images) -> None:
    codec = calibrate(cache_uri, images)
    file = write_feature_file(cache_uri, [encode_row(image, codec) for image in images], codec).file
    metadata = pq.read_schema(pa.BufferReader(storage.read_bytes(storage.join(cache_uri, file)))).metadata
    assert (metadata[b"codec"], metadata[b"calibration"]) == (b"int8", codec.calibration_digest.encode())


def test_rows_of_a_codec_of_the_same_size_are_refused(make_identity, make_image, root: str) -> None:
    uri = create_cache(root, make_identity(), "float16")
    with pytest.raises(CacheError, match=r"bfloat16 .* float16"):
        write_feature_file(uri, [encode_row(make_image("a"), get_codec("bfloat16"))])
    with pytest.raises(CacheError, match="whose codec is float16"):
        write_feature_file(uri, [encode_row(make_image("a"), get_codec("bfloat16"))], get_codec("bfloat16"))
    assert commit(uri) == 0
