import hashlib

import pytest
import torch

from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.errors import BadImageError, DataError
from meteor.image.pixels import PixelSettings, SlicedImage, slice_bytes
from meteor.image.transform import normalise
from meteor.vision.encode_images import encode_each, encode_sliced
from meteor.vision.encoder import FrozenEncoder
from meteor.vision.live import LiveFeatures

PIXELS = PixelSettings(resolution=56, max_aspect_ratio=8, max_pixels=40_000)


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return FrozenEncoder.from_pretrained(clip_folder, attention_layers=(-2, -1))


def make_key(data):
    return hashlib.sha256(data).hexdigest()


def test_bytes_become_the_sub_images_of_their_plan(make_image, png):
    # 112 x 56 at 56: two squares side by side, and a global view of 39.6 x 79 pixels cut to whole patches (spec, step 5).
    sliced = slice_bytes(png(make_image(112, 56)), "key", PIXELS)
    assert (sliced.image_key, sliced.width, sliced.height, sliced.plan.grid) == ("key", 112, 56, (2, 1))
    assert [sub_image.shape for sub_image in sliced.sub_images] == [(28, 70, 3), (56, 56, 3), (56, 56, 3)]


@pytest.mark.parametrize(
    ("make_bytes", "reason"),
    [
        (lambda shown, png: b"", "empty"),
        (lambda shown, png: b"no image", "not_an_image"),
        (lambda shown, png: png(shown(50, 50))[:-200], "truncated"),
        (lambda shown, png: png(shown(201, 200)), "too_many_pixels"),
        (lambda shown, png: png(shown(90, 10)), "aspect_ratio"),
    ],
)
def test_bytes_that_cannot_be_used_are_refused_with_their_reason(make_image, png, make_bytes, reason):
    with pytest.raises(BadImageError) as caught:
        slice_bytes(make_bytes(make_image, png), "key", PIXELS)
    assert caught.value.reason == reason


def test_images_encoded_together_equal_their_sub_images_encoded_one_by_one(encoder, make_image, png):
    sizes = [(112, 56), (56, 56), (60, 150)]
    sliced = [slice_bytes(png(make_image(*size, seed=i)), f"k{i}", PIXELS) for i, size in enumerate(sizes)]
    encoded = encode_sliced(sliced, encoder)
    assert [image.image_key for image in encoded] == ["k0", "k1", "k2"]
    assert [(image.width, image.height) for image in encoded] == sizes
    for one, image in zip(sliced, encoded, strict=True):
        assert (image.grid, image.patch_grids) == (one.plan.grid, one.plan.patch_grids)
        assert image.attention_layers == (-2, -1)
        for i, sub_image in enumerate(one.sub_images):
            (alone,) = encoder.encode([normalise(sub_image, encoder.mean, encoder.std)])
            torch.testing.assert_close(image.features[i], alone.features)
            torch.testing.assert_close(image.cls_attention[i], alone.cls_attention)
            torch.testing.assert_close(image.cls[i], alone.cls)


def test_live_features_are_those_of_the_file(encoder, make_image, png, tmp_path):
    data = png(make_image(112, 56))
    (tmp_path / "a.png").write_bytes(data)
    live = LiveFeatures(encoder, {make_key(data): str(tmp_path / "a.png")}, PIXELS)
    got = live.get(make_key(data))
    (expected,) = encode_sliced([slice_bytes(data, make_key(data), PIXELS)], encoder)
    assert (got.image_key, got.patch_grids) == (expected.image_key, expected.patch_grids)
    for one, other in zip(got.features, expected.features, strict=True):
        assert torch.equal(one, other)


def test_cached_features_equal_live_ones_within_half_precision(encoder, make_image, png, tmp_path):
    data = png(make_image(112, 56))
    key = make_key(data)
    (tmp_path / "a.png").write_bytes(data)
    live = LiveFeatures(encoder, {key: str(tmp_path / "a.png")}, PIXELS).get(key)
    identity = CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype="float32",
        select_layer=-2,
        preprocessing=encoder.preprocessing,
        slicing={"max_slices": 6, "resolution": 56, "patch_size": 14},
    )
    uri = create_cache(str(tmp_path / "cache"), identity, "float16")
    write_feature_file(uri, [encode_row(live, get_codec("float16"))])
    commit(uri)
    cached = FeatureCache.open(uri).get(key)
    assert (cached.grid, cached.patch_grids, cached.width) == (live.grid, live.patch_grids, live.width)
    for one, other in zip(cached.features, live.features, strict=True):
        assert one.dtype == torch.float16
        # Half a unit in the last of 11 bits; 2^-25 below the smallest normal number.
        assert ((one.float() - other).abs() <= other.abs() * 2**-11 + 2**-25).all()
    for one, other in zip(cached.cls_attention, live.cls_attention, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cached.cls, live.cls)


def test_an_image_that_is_gone_or_has_changed_since_it_was_indexed_is_an_error(encoder, make_image, png, tmp_path):
    data, file = png(make_image(56, 56)), tmp_path / "a.png"
    live = LiveFeatures(encoder, {make_key(data): str(file)}, PIXELS)
    with pytest.raises(DataError, match=r"a\.png was readable when it was indexed"):
        live.get(make_key(data))
    file.write_bytes(png(make_image(56, 56, seed=1)))
    with pytest.raises(DataError, match=r"a\.png has changed since it was indexed"):
        live.get(make_key(data))


def test_an_image_that_other_settings_refuse_is_an_error(encoder, make_image, png, tmp_path):
    data, file = png(make_image(90, 10)), tmp_path / "a.png"
    file.write_bytes(data)
    with pytest.raises(DataError, match="aspect ratio"):
        LiveFeatures(encoder, {make_key(data): str(file)}, PIXELS).get(make_key(data))


def test_sliced_images_survive_as_one_run_of_bytes(make_image, png):
    for size in [(112, 56), (50, 50), (60, 150)]:
        sliced = slice_bytes(png(make_image(*size)), "key", PIXELS)
        again = SlicedImage.from_bytes("key", sliced.width, sliced.height, sliced.to_bytes(), PIXELS)
        assert (again.width, again.height, again.plan) == (*size, sliced.plan)
        assert all((one == other).all() for one, other in zip(again.sub_images, sliced.sub_images, strict=True))


def test_an_image_that_is_not_finite_is_told_apart_from_its_neighbours(encoder, make_image, png, monkeypatch):
    sliced = [slice_bytes(png(make_image(112, 56, seed=i)), f"k{i}", PIXELS) for i in range(3)]
    expected, encode = encode_sliced(sliced, encoder), encoder.encode

    def encode_with_a_bad_one(pixels, **options):
        pixels[4] = pixels[4] * float("nan")  # each image has three sub-images
        return encode(pixels, **options)

    monkeypatch.setattr(encoder, "encode", encode_with_a_bad_one)
    got = encode_each(sliced, encoder)
    assert isinstance(got[1], BadImageError)
    assert got[1].reason == "non_finite_features"
    assert "in 1 of 3 sub-images of k1" in str(got[1])
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(got[i].features, expected[i].features, strict=True))
    with pytest.raises(BadImageError, match="of k1"):
        encode_sliced(sliced, encoder)
