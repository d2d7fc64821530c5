"""Transcoding: the source's features in another codec, complete, resumable, and never from what lost them."""

import importlib
from collections.abc import Callable

import pytest
import torch

from meteor import storage
from meteor.cache import (
    FeatureCache,
    QuarantineRow,
    calibrate,
    commit,
    create_cache,
    encode_row,
    get_codec,
    open_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.calibration import calibration_bytes
from meteor.cache.upkeep import transcode
from meteor.errors import CacheError, SettingsError, StorageError
from meteor.features import ImageFeatures

GONE = QuarantineRow("", "images/gone.png", "empty", "0 bytes")
# The package has the function under this name.
TRANSCODE = importlib.import_module("meteor.cache.upkeep.transcode")


@pytest.fixture
def make_cache(make_identity, root: str) -> Callable[..., str]:
    """A committed cache of the images, one of its images in quarantine."""

    def make(images: list[ImageFeatures], codec: str = "float16") -> str:
        uri = create_cache(root, make_identity(), codec)
        add(uri, images)
        return uri

    return make


def add(uri: str, images: list[ImageFeatures]) -> None:
    codec = calibrate(uri, images)
    write_feature_file(uri, [encode_row(image, codec) for image in images])
    record_quarantine(uri, [GONE])
    commit(uri)


def num_files(uri: str, folder: str) -> int:
    return len(storage.list_objects(storage.join(uri, folder)))


def test_a_variant_holds_every_image_and_the_quarantine(make_cache, make_image, root: str) -> None:
    images = [make_image(str(i), shape=i, layers=(-2, -5)) for i in range(7)]
    source = FeatureCache.open(make_cache(images))
    progress: list[tuple[int, int]] = []
    uri = transcode(source.uri, "int8", on_progress=lambda *done: progress.append(done))
    assert uri == storage.join(root, source.identity.key, "int8")
    assert progress == [(i + 1, 7) for i in range(7)]
    variant, codec = FeatureCache.open(uri), open_codec(uri)
    assert variant.identity == source.identity
    assert variant.keys() == source.keys()
    assert variant.quarantine() == [GONE]
    for image in images:
        stored, got = source.get(image.image_key), variant.get(image.image_key)
        assert (got.grid, got.patch_grids, got.attention_layers) == (image.grid, image.patch_grids, (-2, -5))
        assert torch.equal(got.cls, image.cls)
        for got_PC, stored_PC in zip(got.features, stored.features, strict=True):
            # Of what the source holds, which float16 has rounded already.
            assert torch.equal(got_PC, codec.decode(bytearray(codec.encode(stored_PC)), *stored_PC.shape))
    assert variant.verify() == []


def test_int8_is_calibrated_on_the_sources_lowest_keys(make_cache, make_image, monkeypatch) -> None:
    source = FeatureCache.open(make_cache([make_image(str(i), shape=i) for i in range(5)]))
    monkeypatch.setattr(TRANSCODE, "CALIBRATION_IMAGES", 3)
    uri = transcode(source.uri, "int8")
    lowest = [source.get(key) for key in source.keys()[:3]]
    assert storage.read_bytes(storage.join(uri, "calibration.json")) == calibration_bytes(lowest)


def test_wider_types_lose_nothing(make_cache, make_image) -> None:
    image = make_image("a", shape=1)
    uri = make_cache([image])
    got = FeatureCache.open(transcode(uri, "float32")).get(image.image_key)
    for got_PC, feature_PC in zip(got.features, image.features, strict=True):
        assert torch.equal(got_PC, feature_PC.half().float())


def test_an_interrupted_run_goes_on_where_it_was(make_cache, make_image, monkeypatch) -> None:
    source_uri = make_cache([make_image(str(i), shape=i) for i in range(9)])
    # One or two images fill a file, every second file is committed.
    monkeypatch.setattr(TRANSCODE, "FILE_BYTES", 500)
    monkeypatch.setattr(TRANSCODE, "FILES_PER_COMMIT", 2)
    written: list[int] = []

    def break_off(*arguments) -> None:
        if len(written) == 3:
            raise StorageError("the plug was pulled")
        written.append(write_feature_file(*arguments).num_images)

    with monkeypatch.context() as broken:
        broken.setattr(TRANSCODE, "write_feature_file", break_off)
        with pytest.raises(StorageError, match="plug"):
            transcode(source_uri, "int8")
    target_uri = (
        storage.join(source_uri, "../int8") if "://" not in source_uri else source_uri[: -len("float16")] + "int8"
    )
    assert len(FeatureCache.open(target_uri)) == sum(written[:2]) < sum(written) < 9
    encoded: list[str] = []

    def note(image: ImageFeatures, codec):
        encoded.append(image.image_key)
        return encode_row(image, codec)

    monkeypatch.setattr(TRANSCODE, "encode_row", note)
    progress: list[tuple[int, int]] = []
    variant = FeatureCache.open(transcode(source_uri, "int8", on_progress=lambda *done: progress.append(done)))
    # The third file was finished and not committed: it is adopted.
    assert len(encoded) == 9 - sum(written)
    assert progress == [(done, 9) for done in range(sum(written) + 1, 10)]
    assert len(variant) == 9
    assert variant.manifest.num_shadowed == 0


def test_a_complete_variant_is_left_alone(make_cache, make_image) -> None:
    uri = make_cache([make_image(str(i)) for i in range(3)])
    variant = FeatureCache.open(transcode(uri, "int8"))
    before = storage.list_objects(variant.uri)
    assert transcode(uri, "int8") == variant.uri
    assert storage.list_objects(variant.uri) == before


def test_new_images_and_new_layers_of_the_source_come_along(make_cache, make_image) -> None:
    uri = make_cache([make_image("a"), make_image("b")])
    transcode(uri, "int8")
    add(uri, [make_image("a", layers=(-2, -5)), make_image("c", shape=1)])
    variant = FeatureCache.open(transcode(uri, "int8"))
    assert variant.keys() == FeatureCache.open(uri).keys()
    assert variant.get(make_image("a").image_key).attention_layers == (-2, -5)
    assert num_files(variant.uri, "data") == 2


def test_an_image_that_the_codec_cannot_hold_is_quarantined(make_cache, make_image) -> None:
    good, large = make_image("good"), make_image("large")
    large.features[0][0, 0] = 1e5
    variant = FeatureCache.open(transcode(make_cache([good, large], "float32"), "float16"))
    assert variant.keys() == [good.image_key]
    assert variant.quarantined() == {"images/gone.png": "empty", large.image_key: "non_finite_features"}


def test_int8_is_the_end(make_cache, make_image) -> None:
    uri = make_cache([make_image("a")], "int8")
    with pytest.raises(CacheError, match=r"restore the precision.*cache_features"):
        transcode(uri, "float16")


def test_what_makes_no_variant_is_refused(make_cache, make_image, root: str) -> None:
    uri = make_cache([make_image("a")])
    with pytest.raises(CacheError, match="float16 already"):
        transcode(uri, "float16")
    with pytest.raises(SettingsError, match="zip"):
        transcode(uri, "zip")
    moved = storage.join(root, "moved", "float16")
    for info in storage.list_objects(uri):
        storage.write_bytes(info.uri.replace(uri, moved), storage.read_bytes(info.uri))
    with pytest.raises(CacheError, match="does not end in its key"):
        transcode(moved, "int8")
    assert get_codec("float16").name == FeatureCache.open(moved).codec
