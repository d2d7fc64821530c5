"""Files that a path, a folder or a pattern names, on local disk and on S3."""

import pytest

from meteor import storage
from meteor.data.data_files import find_data_files
from meteor.errors import DataError, NotFoundError

NAMES = [
    "a/train-0.parquet",
    "a/train-1.parquet",
    "a/test-0.parquet",
    "a/README.md",
    "a/.cache/train-9.parquet",
    "b/deep/train-0.parquet",
    "b/[odd]{1,2}*.json",
    "t/00000.tar",
    "t/00001.tar",
    "t/00010.tar",
    "t/info.json",
    "mixed/1.tar",
    "mixed/1.parquet",
    "none/readme.txt",
]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    place = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")
    for name in NAMES:
        storage.write_bytes(storage.join(place, name), b"x")
    return place


@pytest.mark.parametrize(
    ("pattern", "expected", "below"),
    [
        ("a/train-0.parquet", ["a/train-0.parquet"], ""),
        ("a", ["a/test-0.parquet", "a/train-0.parquet", "a/train-1.parquet"], "test-0.parquet"),
        ("a/", ["a/test-0.parquet", "a/train-0.parquet", "a/train-1.parquet"], "test-0.parquet"),
        ("a/train-*.parquet", ["a/train-0.parquet", "a/train-1.parquet"], "train-0.parquet"),
        ("a/train-[!0].parquet", ["a/train-1.parquet"], "train-1.parquet"),
        ("*/train-?.parquet", ["a/train-0.parquet", "a/train-1.parquet"], "a/train-0.parquet"),
        (
            "**/train-*.parquet",
            ["a/train-0.parquet", "a/train-1.parquet", "b/deep/train-0.parquet"],
            "a/train-0.parquet",
        ),
        ("{a,b/deep}/train-0.parquet", ["a/train-0.parquet", "b/deep/train-0.parquet"], "a/train-0.parquet"),
        ("t/{00000..00001}.tar", ["t/00000.tar", "t/00001.tar"], "00000.tar"),
        ("t", ["t/00000.tar", "t/00001.tar", "t/00010.tar"], "00000.tar"),
        ("b/[odd]{1,2}*.json", ["b/[odd]{1,2}*.json"], ""),
    ],
)
def test_a_pattern_names_files(root, pattern, expected, below):
    found = find_data_files(storage.join(root, pattern))
    assert [info.uri for info in found.infos] == [storage.join(root, name) for name in expected]
    assert found.below(found.infos[0]) == below
    assert found.is_one == (below == "")


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("t/{00000..00002}.tar", NotFoundError, r"00002\.tar does not exist"),
        ("absent", NotFoundError, "absent does not exist"),
        ("a/absent-*.parquet", DataError, "names no file of samples"),
        ("none", DataError, "names no file of samples"),
        ("none/readme.txt", DataError, "no known form"),
        ("mixed", DataError, r"several forms \(\.parquet, \.tar\)"),
        ("t/{0..9999999}.tar", DataError, "more than 1,000,000 files"),
    ],
)
def test_a_pattern_without_files_is_refused(root, pattern, error, message):
    with pytest.raises(error, match=message):
        find_data_files(storage.join(root, pattern))
