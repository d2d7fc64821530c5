"""Exported images: plain safetensors that need nothing of this library to be read."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from meteor import storage
from meteor.cache import FeatureCache, calibrate, commit, create_cache, encode_row, write_feature_file
from meteor.cache.upkeep import export_images
from meteor.errors import CacheError


@pytest.fixture
def images(make_image) -> list:
    return [make_image(str(i), shape=i, layers=(-2, -5)) for i in range(3)]


def make_cache(root: str, identity, images, codec: str = "float16") -> FeatureCache:
    uri = create_cache(root, identity, codec)
    calibrated = calibrate(uri, images)
    write_feature_file(uri, [encode_row(image, calibrated) for image in images])
    commit(uri)
    return FeatureCache.open(uri)


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_file_holds_the_image_and_can_be_divided_again(
    make_identity, images, root: str, tmp_path: Path, codec: str
) -> None:
    cache = make_cache(root, make_identity(), images, codec)
    keys = [image.image_key for image in images]
    uris = export_images(cache, keys, storage.join(root, "exported"))
    assert uris == [storage.join(root, "exported", f"{key}.safetensors") for key in keys]
    for uri, key in zip(uris, keys, strict=True):
        image, tensors = cache.get(key), load(storage.read_bytes(uri))
        assert [tuple(grid) for grid in tensors["patch_grids"].tolist()] == list(image.patch_grids)
        assert tensors["patch_grids"].dtype == torch.int32
        num_patches = tensors["patch_grids"].prod(dim=1).tolist()
        features, attention = tensors["features"].split(num_patches), tensors["cls_attention"].split(num_patches, dim=1)
        assert all(torch.equal(*pair) for pair in zip(features, image.features, strict=True))
        assert all(torch.equal(*pair) for pair in zip(attention, image.cls_attention, strict=True))
        assert torch.equal(tensors["cls"], image.cls)


def test_metadata_says_where_the_numbers_come_from(make_identity, images, tmp_path: Path) -> None:
    cache = make_cache(str(tmp_path), make_identity(), images)
    names = {images[1].image_key: "charts/a"}
    uris = export_images(cache, [image.image_key for image in images[:2]], str(tmp_path / "out"), names=names)
    assert uris[1] == str(tmp_path / "out" / "charts/a.safetensors")
    assert set(load_file(uris[1])) == {"features", "cls_attention", "cls", "patch_grids"}
    with safe_open(uris[1], framework="pt") as file:
        assert file.metadata() == {
            "image_key": images[1].image_key,
            "width": "640",
            "height": "481",
            "grid": "2,1",
            "attention_layers": "-2,-5",
            "cache_key": cache.identity.key,
            "codec": "float16",
            "version": "1",
        }
    with safe_open(uris[0], framework="pt") as file:
        assert file.metadata()["grid"] == ""


def test_nothing_is_written_when_an_image_is_unknown_or_a_name_is_taken_twice(
    make_identity, images, tmp_path: Path
) -> None:
    cache = make_cache(str(tmp_path / "cache"), make_identity(), images)
    keys, out = [image.image_key for image in images], tmp_path / "out"
    with pytest.raises(CacheError, match=f"1 of 4 images are not in version 1.*{'0' * 64}"):
        export_images(cache, [*keys, "0" * 64], str(out))
    with pytest.raises(CacheError, match=r"same\.safetensors"):
        export_images(cache, keys, str(out), names=dict.fromkeys(keys[:2], "same"))
    assert not out.exists()
