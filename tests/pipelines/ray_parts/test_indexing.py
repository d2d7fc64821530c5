"""What the first pass asks the store, and what it publishes on the way; no Ray."""

import os
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pyarrow as pa
import pytest
from PIL import Image

from meteor import storage
from meteor.assembly import index_uri
from meteor.cache import DatasetIndex, IndexRow
from meteor.data.inspect_image import inspect_image
from meteor.data.sample_sets import SampleSet
from meteor.errors import StorageError
from meteor.image.pixels import PixelSettings
from pipelines.ray_parts import image_facts, indexing
from pipelines.ray_parts.image_facts import read_image

BELOW = ["many/below/1.png", "many/below/2.png", "many/below/3.png"]


@pytest.fixture
def asked(monkeypatch):
    """URIs of listings and of single looks, as they are asked for."""
    calls = {"list_objects": [], "stat": []}
    for name, uris in calls.items():
        real = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda uri, real=real, uris=uris: uris.append(uri) or real(uri))
    monkeypatch.setattr(indexing, "_LIST_FROM", 3)
    return calls


def test_a_crowded_folder_of_an_object_store_is_listed_and_other_names_are_asked_for_one_by_one(s3_root, asked):
    for name in ["many/1.png", "many/2.png", "many/3.png", *BELOW, "many/unwanted.png", "few/5.png"]:
        storage.write_bytes(f"{s3_root}/{name}", name.encode())
    names = ["many/1.png", "many/2.png", "many/absent.png", *BELOW, "few/5.png", "few/absent.png"]
    asked["stat"].clear()
    found = indexing.stat_all([*(f"{s3_root}/{name}" for name in names), "outside:../escape.png"])
    assert asked["list_objects"] == [f"{s3_root}/many"]
    assert sorted(asked["stat"]) == [f"{s3_root}/few/5.png", f"{s3_root}/few/absent.png"]
    there = [name for name in names if "absent" not in name]
    assert found == {f"{s3_root}/{name}": storage.stat(f"{s3_root}/{name}") for name in there}


def test_a_file_of_any_kind_is_a_row_with_a_reason(tmp_path, monkeypatch):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    uris = {name: f"{tmp_path}/{name}" for name in ("loop.png", "folder.png", "fifo.png", "good.png", "gone.png")}
    uris["long"] = f"{tmp_path}/{'x' * 300}"
    found = indexing.stat_all(uris.values())
    assert {name for name, uri in uris.items() if uri in found} == {"loop.png", "good.png", "long"}

    def reason(name):
        row = read_image({"name": name, "uri": uris[name]}, max_pixels=1000)
        IndexRow(**row)
        return row["reason"]

    reasons = {name: reason(name) for name in uris}
    missing = dict.fromkeys(["folder.png", "fifo.png", "gone.png"], "missing")
    assert reasons == {**missing, "loop.png": "inaccessible", "long": "inaccessible", "good.png": ""}
    # The check of the data gives the same reasons.
    pixels, roots = PixelSettings(max_pixels=1000), {"": str(tmp_path)}
    for name in set(uris) - {"long"}:
        for full in (False, True):
            assert inspect_image(name, roots, pixels, full=full).reason == reasons[name], (name, full)

    for error in (MemoryError(), RuntimeError("odd"), RecursionError(), KeyError("x")):
        monkeypatch.setattr(image_facts, "decode_image", Mock(side_effect=error))
        assert reason("good.png") == "failed"
    monkeypatch.setattr(storage, "read_bytes", Mock(side_effect=StorageError("the store is away")))
    with pytest.raises(StorageError, match="away"):
        reason("good.png")


def test_an_image_is_read_again_where_its_reason_may_be_gone_and_counts_when_it_is(
    make_settings, tmp_path, monkeypatch
):
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    samples, read = make_set("large.png", "text.png"), []

    def read_here(places, max_pixels):
        read.append(len(places))
        return (IndexRow(**read_image(place, max_pixels=max_pixels)) for place in places)

    monkeypatch.setattr(indexing, "read_images", read_here)

    def update(max_pixels):
        settings = make_settings(data={"max_pixels": max_pixels})
        index, num_read = indexing.update_index(settings, [samples], {"": str(tmp_path)})
        return num_read, {row.name: row.reason for row in index.rows()}

    assert update(5000) == (2, {"large.png": "too_many_pixels", "text.png": "not_an_image"})
    assert update(5000) == (0, {"large.png": "too_many_pixels", "text.png": "not_an_image"})
    assert update(20_000) == (1, {"large.png": "", "text.png": "not_an_image"})
    assert update(20_000)[0] == 0
    assert read == [2, 1, 1, 0]


def test_local_files_are_asked_for_one_by_one(tmp_path, asked):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"x" * i)
    found = indexing.stat_all([str(tmp_path / f"{i}.png") for i in range(5)])
    assert asked["list_objects"] == []
    assert {uri: info.size_bytes for uri, info in found.items()} == {str(tmp_path / f"{i}.png"): i for i in range(4)}


def make_set(*names):
    samples = SampleSet.of("pretrain", [])
    samples.__dict__["distinct_images"] = pa.array(names)
    return samples


def test_a_first_pass_that_ends_early_keeps_what_it_had_published(make_settings, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"no image %d" % i)
    settings = make_settings(data={"roots": {"": str(folder)}}, cache={"commit_every_s": 1e-9})
    sets = [make_set(*(f"{i}.png" for i in range(6)))]

    def read(places, max_pixels, until=6):
        for number, place in enumerate(places):
            if number == until:
                raise KeyboardInterrupt
            yield indexing.IndexRow(**read_image(place, max_pixels=max_pixels))

    monkeypatch.setattr(indexing, "read_images", lambda *given: read(*given, until=4))
    with pytest.raises(KeyboardInterrupt):
        indexing.update_index(settings, sets, settings.data.roots)
    assert len(DatasetIndex.latest(index_uri(settings))) == 4
    monkeypatch.setattr(indexing, "read_images", read)
    index, num_read = indexing.update_index(settings, sets, settings.data.roots)
    assert (len(index), num_read) == (6, 2)
    assert indexing.update_index(settings, sets, settings.data.roots)[1] == 0


def test_a_file_that_samples_name_otherwise_now_is_found_under_both_names(make_settings, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(
        indexing,
        "read_images",
        lambda places, limit: [indexing.IndexRow(**read_image(one, max_pixels=limit)) for one in places],
    )
    flat = make_settings(data={"roots": {"": str(folder)}})
    indexing.update_index(flat, [make_set("1.png")], flat.data.roots)
    settings = make_settings(data={"roots": {"coco/": str(folder)}})
    index, num_read = indexing.update_index(settings, [make_set("coco/1.png")], settings.data.roots)
    assert ([row.name for row in index.rows()], num_read) == (["1.png", "coco/1.png"], 0)


def test_images_whose_state_looks_new_are_read_once_and_stay_the_same_data(make_settings, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "2.png")
    read = []

    def read_here(places, max_pixels):
        read.append([place["name"] for place in places])
        return [IndexRow(**read_image(place, max_pixels=max_pixels)) for place in places]

    monkeypatch.setattr(indexing, "read_images", read_here)
    settings = make_settings()

    def digest():
        index, _ = indexing.update_index(settings, [make_set("1.png", "2.png")], {"": str(tmp_path)})
        return index.digest(["1.png", "2.png"])

    first = digest()
    # An older release knew files by their modification time alone.
    rows = [
        replace(row, etag=str(os.stat(row.uri).st_mtime_ns)) for row in DatasetIndex.latest(index_uri(settings)).rows()
    ]
    DatasetIndex.publish(index_uri(settings), rows)
    assert digest() == digest() == first
    # A copy with its times, as a backup or another disk has it.
    shutil.copy2(tmp_path / "1.png", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "1.png")
    assert digest() == digest() == first
    assert read == [["1.png", "2.png"], ["1.png", "2.png"], [], ["1.png"], []]
