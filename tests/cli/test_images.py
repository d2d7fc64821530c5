"""Images found by key, the beginning of one, name and URI."""

import pytest

from meteor.cache import (
    CacheIdentity,
    DatasetIndex,
    FeatureCache,
    IndexRow,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cli.images import find_images
from meteor.errors import CacheError

ONE, TWIN, OTHER = "a" * 64, "a" * 63 + "b", "d" * 64


@pytest.fixture
def cache(make_model, make_features, tmp_path):
    uri = create_cache(str(tmp_path), CacheIdentity.from_dict(make_model().config.cache_identity), "float16")
    write_feature_file(uri, [encode_row(make_features(key), get_codec("float16")) for key in (ONE, TWIN, OTHER)])
    record_quarantine(
        uri,
        [
            QuarantineRow("c" * 64, "x/odd.jpg", "truncated", "the file ends early"),
            QuarantineRow("", "x/unreadable.jpg", "unreadable", "permission denied"),
        ],
    )
    commit(uri)
    DatasetIndex.publish(
        str(tmp_path / "index"),
        [
            IndexRow("x/one.jpg", "s3://in/x/one.jpg", 1, "e", ONE, 100, 80, "ok"),
            IndexRow("x/unreadable.jpg", "s3://in/x/unreadable.jpg", 1, "e", "", 0, 0, "bad", "unreadable"),
        ],
    )
    return FeatureCache.open(uri)


@pytest.mark.parametrize(
    ("asked", "key", "name"),
    [
        ("x/one.jpg", ONE, "x/one.jpg"),
        ("s3://in/x/one.jpg", ONE, "x/one.jpg"),
        (ONE, ONE, ONE),
        ("d" * 6, OTHER, OTHER),
        ("c" * 10, "c" * 64, "c" * 64),
        ("x/unreadable.jpg", "x/unreadable.jpg", "x/unreadable.jpg"),
    ],
)
def test_an_image_is_found_by_whatever_names_it(cache, asked, key, name):
    assert find_images(cache, [asked]) == {key: name}


def test_what_fits_none_or_several_is_refused(cache):
    with pytest.raises(CacheError, match="'aaaaaaa' fits 2 image keys of"):
        find_images(cache, ["aaaaaaa"])
    with pytest.raises(CacheError, match="'ddddd' is no image key and no name"):
        find_images(cache, ["ddddd"])


def test_of_two_names_of_an_image_the_first_counts_with_a_warning(cache, caplog):
    assert find_images(cache, ["x/one.jpg", ONE, "x/one.jpg"]) == {ONE: "x/one.jpg"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{ONE} is the same image as x/one.jpg: there is one file for both"
    ]
