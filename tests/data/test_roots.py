import os

import pytest

from meteor.data.roots import resolve_image
from meteor.errors import ImagePathError

ROOTS = {"": "/data/images", "coco/": "s3://bucket/coco", "coco/val2017": "/data/val", "ocr_vqa": "/data/ocr/"}


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("1.jpg", "/data/images/1.jpg"),
        ("gqa/images/1.jpg", "/data/images/gqa/images/1.jpg"),
        ("./gqa//a/../1.jpg", "/data/images/gqa/1.jpg"),
        ("coco/train2017/1.jpg", "s3://bucket/coco/train2017/1.jpg"),
        ("coco/val2017/1.jpg", "/data/val/1.jpg"),
        ("coco/val2017b/1.jpg", "s3://bucket/coco/val2017b/1.jpg"),
        ("ocr_vqa/images/1.jpg", "/data/ocr/images/1.jpg"),
        ("ocr_vqa2/1.jpg", "/data/images/ocr_vqa2/1.jpg"),
        ("/data/images/a/1.jpg", "/data/images/a/1.jpg"),
        ("/data/ocr/1.jpg", "/data/ocr/1.jpg"),
        ("s3://bucket/coco/x/1.jpg", "s3://bucket/coco/x/1.jpg"),
        ("..a/1.jpg", "/data/images/..a/1.jpg"),
    ],
)
def test_a_name_is_joined_to_the_root_of_its_longest_prefix(name, uri):
    assert resolve_image(name, ROOTS) == uri


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\0.jpg",
        "../1.jpg",
        "a/../../1.jpg",
        "coco/../secret/1.jpg",
        "coco//etc/passwd",
        "coco/",
        ".",
        "/etc/passwd",
        "/data/images2/1.jpg",
        "/data/images/../secret.jpg",
        "~/1.jpg",
        "s3://other/coco/1.jpg",
        "s3://bucket/coco/../x/1.jpg",
        "s3://bucket/cocoa/1.jpg",
        "https://bucket/coco/1.jpg",
        "file:///data/images/1.jpg",
    ],
)
def test_what_leaves_the_roots_is_refused(name):
    with pytest.raises(ImagePathError):
        resolve_image(name, ROOTS)


def test_without_a_default_root_other_names_are_refused():
    with pytest.raises(ImagePathError, match=r"No root .*'gqa/1.jpg'.*'coco/'"):
        resolve_image("gqa/1.jpg", {"coco/": "/data/coco"})


def test_a_relative_root_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_image("1.jpg", {"": "."}) == os.path.join(os.getcwd(), "1.jpg")


def test_a_link_out_of_the_root_is_refused_and_a_root_that_is_a_link_is_not(tmp_path):
    for folder in ("root", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(b"")
    (tmp_path / "root" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "inside.jpg").symlink_to("1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    roots = {"": str(tmp_path / "root")}
    for name in ("file.jpg", "folder/1.jpg", str(tmp_path / "root" / "folder" / "1.jpg")):
        with pytest.raises(ImagePathError, match="outside every root: add a root that contains it"):
            resolve_image(name, roots)
    assert resolve_image("inside.jpg", roots) == str(tmp_path / "root" / "inside.jpg")
    assert resolve_image("1.jpg", {"": str(tmp_path / "link")}) == str(tmp_path / "link" / "1.jpg")
    # The advice of the message, and a root around both folders.
    for linked in (tmp_path / "elsewhere", tmp_path):
        found = resolve_image("file.jpg", {**roots, "linked": str(linked)})
        assert found == str(tmp_path / "root" / "file.jpg")
    assert resolve_image("folder/1.jpg", roots | {"folder": str(tmp_path / "elsewhere")})


def test_images_inside_files_are_below_the_place_of_their_set(tmp_path):
    cell, member = "#000000001/images/0", "#000000000512+9"
    roots = {"": str(tmp_path / "root"), "@0123/": "s3://b/shards", "@4567/": "/d/x.tar"}
    assert resolve_image(f"@0123/a/x.parquet{cell}", roots) == f"s3://b/shards/a/x.parquet{cell}"
    assert resolve_image(f"@4567/{member}", roots) == f"/d/x.tar{member}"
    for name in (f"@0123/../x.parquet{cell}", f"@0123//d/../../x.parquet{cell}", f"@4567/../x.tar{member}"):
        with pytest.raises(ImagePathError):
            resolve_image(name, roots)
    # A name that only looks like it is a file below the roots, and no way around their check of links.
    (tmp_path / "root").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "root/x.parquet").symlink_to(tmp_path / "x.parquet")
    with pytest.raises(ImagePathError, match="outside every root"):
        resolve_image(f"x.parquet{cell}", roots)
