"""The parts of the encoding pass in one process: slicing, the encoder actor's work, its counts; no Ray."""

import hashlib

import pyarrow as pa
import pytest
import torch

from meteor.assembly import cache_identity, load_encoder, pixel_settings
from meteor.cache import FeatureCache, calibrate, commit, create_cache, needs_calibration
from meteor.image.pixels import slice_bytes
from meteor.vision.encode_images import encode_sliced
from pipelines.ray_parts import encoder as encoder_module
from pipelines.ray_parts import slicing
from pipelines.ray_parts.calibration import encode_places
from pipelines.ray_parts.encoder import DeviceEncoder, Encoder, cut_by_size, unpack_sliced
from pipelines.ray_parts.meter import EncodingMeter
from pipelines.ray_parts.slicing import slice_batch

SIZES = [(50, 50), (200, 90), (90, 200), (56, 120)]


@pytest.fixture
def run(make_settings):
    return make_settings()


@pytest.fixture
def batch(tmp_path, make_image, png):
    """Four good images, one that is gone, one that has changed since it was indexed."""
    keys, uris = [], []
    for i, size in enumerate(SIZES):
        data = png(make_image(*size, seed=i))
        (tmp_path / f"{i}.png").write_bytes(data)
        keys.append(hashlib.sha256(data).hexdigest())
        uris.append(str(tmp_path / f"{i}.png"))
    return pa.table({"image_key": [*keys, "a" * 64, "b" * 64], "uri": [*uris, str(tmp_path / "gone.png"), uris[0]]})


@pytest.fixture
def cache_uri(run):
    return create_cache(run.cache_root, cache_identity(run, load_encoder(run)), run.cache.codec)


def test_sliced_images_come_back_from_their_columns_as_they_were(run, batch):
    table = slice_batch(batch, pixel_settings(run))
    assert table["reason"].to_pylist() == ["", "", "", "", "missing", "changed"]
    images = list(unpack_sliced(table, pixel_settings(run)))
    for image, key, uri, size in zip(
        images, batch["image_key"].to_pylist(), batch["uri"].to_pylist(), SIZES, strict=False
    ):
        with open(uri, "rb") as file:
            expected = slice_bytes(file.read(), key, pixel_settings(run))
        assert (image.image_key, (image.width, image.height), image.plan) == (key, size, expected.plan)
        assert all((one == other).all() for one, other in zip(image.sub_images, expected.sub_images, strict=True))


def test_only_a_few_files_are_read_ahead_and_the_order_stays(run, batch, monkeypatch):
    many = pa.concat_tables([batch.slice(0, 4)] * 20)
    read, ahead = [], []
    real_read, real_slice = slicing.read_unchanged, slicing.slice_bytes

    def counted_read(uri, key):
        read.append(key)
        return real_read(uri, key)

    def counted_slice(data, key, pixels):
        ahead.append(len(read) - len(ahead))
        return real_slice(data, key, pixels)

    monkeypatch.setattr(slicing, "read_unchanged", counted_read)
    monkeypatch.setattr(slicing, "slice_bytes", counted_slice)
    table = slice_batch(many, pixel_settings(run))
    assert table["image_key"].to_pylist() == many["image_key"].to_pylist()
    assert len(ahead) == 80
    assert max(ahead) <= slicing._NUM_READERS


def test_the_actor_writes_what_it_says_it_wrote(run, batch, cache_uri):
    outcomes = Encoder(run, cache_uri)(slice_batch(batch, pixel_settings(run))).to_pylist()
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    good = [row for row in outcomes if not row["reason"]]
    assert sorted(row["image_key"] for row in good) == cache.keys() == sorted(batch["image_key"].to_pylist()[:4])
    assert {row["image_key"]: row["reason"] for row in outcomes if row["reason"]} == {
        "a" * 64: "missing",
        "b" * 64: "changed",
    }
    assert sum(row["num_sub_images"] for row in good) == cache.num_sub_images
    assert sum(row["payload_bytes"] for row in good) == cache.num_bytes
    assert all(row["device_s"] > 0 for row in good)
    images = list(unpack_sliced(slice_batch(batch, pixel_settings(run)), pixel_settings(run)))
    for expected in encode_sliced(images, load_encoder(run)):
        for one, other in zip(cache.get(expected.image_key).features, expected.features, strict=True):
            torch.testing.assert_close(one.float(), other, rtol=2**-10, atol=2**-20)


def test_an_image_whose_features_are_not_finite_leaves_its_neighbours_alone(run, batch, cache_uri, monkeypatch):
    actor = Encoder(run, cache_uri)
    table, calls = slice_batch(batch, pixel_settings(run)), []
    tower = actor._device._encoder

    def encode(pixels, encode=tower.encode, **options):
        calls.append(len(pixels))
        pixels[1] = pixels[1] * float("inf")  # of the second image, whose first sub-image is the second of all
        return encode(pixels, **options)

    monkeypatch.setattr(tower, "encode", encode)
    outcomes = {row["image_key"]: row for row in actor(table).to_pylist()}
    keys = batch["image_key"].to_pylist()
    assert [outcomes[key]["reason"] for key in keys[:4]] == ["", "non_finite_features", "", ""]
    assert "in 1 of 3 sub-images" in outcomes[keys[1]]["message"]
    assert len(calls) == 1
    commit(cache_uri)
    assert FeatureCache.open(cache_uri).keys() == sorted([keys[0], *keys[2:4]])


def test_a_batch_that_is_too_large_becomes_several_files(run, batch, cache_uri, monkeypatch):
    monkeypatch.setattr(encoder_module, "MAX_FILE_BYTES", 1)
    Encoder(run, cache_uri)(slice_batch(batch, pixel_settings(run)))
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    assert len(cache) == len(SIZES)
    assert cache.verify() == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4, 4, 4, 4], [[4, 4], [4, 4]]),
        ([4, 4, 4], [[4, 4], [4]]),
        ([6, 6, 6], [[6], [6], [6]]),
        ([30, 1], [[30], [1]]),
        ([1, 1], [[1, 1]]),
        ([], []),
    ],
)
def test_files_are_cut_about_evenly_and_to_the_limit(sizes, expected):
    assert cut_by_size(sizes, sizes, 10) == expected


def test_an_int8_cache_is_calibrated_on_what_can_be_encoded_before_its_first_row(make_settings, batch):
    run = make_settings(cache={"codec": "int8"})
    uri = create_cache(run.cache_root, cache_identity(run, load_encoder(run)), "int8")
    assert needs_calibration(uri)
    places = list(zip(batch["image_key"].to_pylist(), batch["uri"].to_pylist(), strict=True))
    encoded = list(encode_places(DeviceEncoder(run), places, pixel_settings(run)))
    assert [image.image_key for image in encoded] == batch["image_key"].to_pylist()[:4]
    calibrate(uri, encoded)
    outcomes = Encoder(run, uri)(slice_batch(batch, pixel_settings(run)))
    assert outcomes["reason"].to_pylist().count("") == 4
    commit(uri)
    assert FeatureCache.open(uri).verify() == []


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def outcome(num_sub_images=5, device_s=1.0, reason=""):
    return {"num_sub_images": num_sub_images, "payload_bytes": 10**6, "device_s": device_s, "reason": reason}


def test_rates_count_from_the_first_batch_on_and_totals_from_the_start():
    clock = Clock()
    meter = EncodingMeter(2, clock)
    assert meter.detail() == ", encoders starting"
    clock.now = 120.0
    meter.add([outcome(), outcome()])
    clock.now = 128.0
    meter.add([outcome(), outcome(0, 0.0, "truncated")])
    meter.add([outcome(), outcome()])
    assert meter.num_images == 6
    assert meter.counts() == {
        "sub_images_encoded": 25,
        "bytes_written": 6_000_000,
        "encoding_seconds": 28.0,
        "images_per_s": 0.5,
        "sub_images_per_s": 15 / 8,
        "megabytes_per_s": 0.5,
        "encoder_busy_share": round(3 / 8 / 2, 4),
    }
    assert meter.detail() == ("; now 0.5 images/s, 1.9 sub-images/s, encoders 19% busy, 6 MB written, 0.5 MB/s, 1 bad")


def test_batches_that_arrive_together_count_from_the_start():
    clock = Clock()
    meter = EncodingMeter(1, clock)
    clock.now = 110.0
    meter.add([outcome(2)])
    assert meter.counts()["sub_images_per_s"] == 0.2
    clock.now = 110.001
    meter.add([outcome(3)])
    assert meter.counts()["sub_images_per_s"] == 0.5
