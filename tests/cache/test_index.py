"""The dataset index: what is unchanged is not read again, and its digest means the content alone."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pytest

from meteor import storage
from meteor.cache import DatasetIndex, IndexRow
from meteor.errors import CacheError


def make_row(name: str, *, root: str = "/data", content: str = "", **changes) -> IndexRow:
    row = IndexRow(
        name=name,
        uri=f"{root}/{name}",
        size_bytes=1000,
        etag="1",
        image_key=hashlib.sha256((content or name).encode()).hexdigest(),
        width=640,
        height=480,
        status="ok",
    )
    return replace(row, **changes)


def make_bad_row(name: str) -> IndexRow:
    return make_row(name, image_key="", width=0, height=0, status="bad", reason="truncated")


@pytest.fixture
def index_uri(root: str) -> str:
    return storage.join(root, "index")


def test_rows_come_back_and_unchanged_rows_make_no_new_version(index_uri: str) -> None:
    assert DatasetIndex.latest(index_uri) is None
    rows = [make_row("b.png"), make_bad_row("a.png")]
    first = DatasetIndex.publish(index_uri, rows)
    assert first.version == 1
    assert first.rows() == [rows[1], rows[0]]
    assert DatasetIndex.publish(index_uri, rows[:1]).version == 1
    assert DatasetIndex.publish(index_uri, []).version == 1
    assert DatasetIndex.latest(index_uri).rows() == first.rows()


def test_new_rows_extend_and_replace_by_uri_and_old_versions_stay(index_uri: str) -> None:
    DatasetIndex.publish(index_uri, [make_row("a.png"), make_row("b.png")])
    second = DatasetIndex.publish(index_uri, [make_row("b.png", etag="2", content="new b"), make_row("c.png")])
    assert second.version == 2
    assert len(second) == 3
    assert second.lookup("/data/b.png") == make_row("b.png", etag="2", content="new b")
    assert second.lookup("c.png") == make_row("c.png")
    assert second.lookup("d.png") is None
    assert DatasetIndex.open(index_uri, 1).lookup("/data/b.png") == make_row("b.png")


def test_of_two_rows_for_one_uri_the_last_counts(index_uri: str) -> None:
    index = DatasetIndex.publish(index_uri, [make_row("a.png"), make_row("a.png", etag="2")])
    assert index.rows() == [make_row("a.png", etag="2")]


def test_a_file_is_unchanged_while_uri_size_and_etag_are(index_uri: str) -> None:
    index = DatasetIndex.publish(index_uri, [make_row("a.png")])
    assert index.unchanged(storage.ObjectInfo("/data/a.png", 1000, "1")) == make_row("a.png")
    assert index.unchanged(storage.ObjectInfo("/data/a.png", 1000, "2")) is None
    assert index.unchanged(storage.ObjectInfo("/data/a.png", 1001, "1")) is None
    assert index.unchanged(storage.ObjectInfo("/data/b.png", 1000, "1")) is None


def test_writers_that_publish_at_once_lose_nothing(index_uri: str) -> None:
    barrier = threading.Barrier(4)

    def publish(writer: int) -> None:
        barrier.wait()
        DatasetIndex.publish(index_uri, [make_row(f"{writer}-{i}.png") for i in range(3)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, range(4)))
    latest = DatasetIndex.latest(index_uri)
    assert latest.version == 4
    assert {row.name for row in latest.rows()} == {f"{writer}-{i}.png" for writer in range(4) for i in range(3)}


def make_digest(tmp_path, rows: list[IndexRow], images: list[str]) -> str:
    return DatasetIndex.publish(str(tmp_path / hashlib.sha256(repr(rows).encode()).hexdigest()), rows).digest(images)


def test_the_digest_ignores_order_place_times_and_other_images(tmp_path) -> None:
    rows = [make_row("a.png"), make_row("b.png"), make_bad_row("c.png")]
    names = ["a.png", "b.png", "c.png"]
    digest = make_digest(tmp_path, rows, names)
    moved = [replace(row, uri=f"s3://bucket/{row.name}", etag="abc", size_bytes=1000) for row in rows]
    assert make_digest(tmp_path, rows[::-1], ["c.png", "a.png", "b.png", "a.png"]) == digest
    assert make_digest(tmp_path, moved, names) == digest
    assert make_digest(tmp_path, rows, [row.uri for row in rows]) == digest
    assert make_digest(tmp_path, [*rows, make_row("d.png")], names) == digest
    assert make_digest(tmp_path, [*rows, *moved], names) == digest


@pytest.mark.parametrize(
    "changes",
    [
        {"image_key": "0" * 64},
        {"width": 641},
        {"height": 481},
        {"status": "bad"},
        {"name": "renamed.png"},
    ],
)
def test_the_digest_changes_with_what_matters(tmp_path, changes: dict) -> None:
    rows = [make_row("a.png"), make_row("b.png")]
    changed = [rows[0], replace(rows[1], **changes)]
    uris = [row.uri for row in rows]
    assert make_digest(tmp_path, rows, uris) != make_digest(tmp_path, changed, uris)
    assert make_digest(tmp_path, rows, uris) != make_digest(tmp_path, rows, uris[:1])


def test_an_image_that_is_not_indexed_is_named(tmp_path) -> None:
    with pytest.raises(CacheError, match=r"1 images.*z\.png.*cache_features"):
        make_digest(tmp_path, [make_row("a.png")], ["a.png", "z.png"])


def test_a_name_with_several_contents_is_refused_but_not_its_uris(tmp_path) -> None:
    rows = [make_row("1.png", root="/a"), make_row("1.png", root="/b", content="other"), make_row("1.png", root="/c")]
    index = DatasetIndex.publish(str(tmp_path), rows)
    with pytest.raises(CacheError, match=r"1\.png.*by URI"):
        index.lookup("1.png")
    assert index.lookup("/b/1.png") == rows[1]
    same = DatasetIndex.publish(str(tmp_path / "same"), [rows[0], rows[2]])
    assert same.lookup("1.png").image_key == rows[0].image_key


def test_an_index_of_a_newer_release_is_refused(tmp_path, monkeypatch) -> None:
    from meteor.cache import index as module
    from meteor.cache.table import versioned

    with monkeypatch.context() as newer:
        newer.setattr(module, "INDEX_SCHEMA", versioned(module.INDEX_SCHEMA, 99))
        DatasetIndex.publish(str(tmp_path), [make_row("a.png")])
    with pytest.raises(CacheError, match=r"99.*newer"):
        DatasetIndex.latest(str(tmp_path))


def test_a_damaged_index_is_named(tmp_path) -> None:
    DatasetIndex.publish(str(tmp_path), [make_row("a.png")])
    file = tmp_path / "v00000001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CacheError, match=r"v00000001\.parquet is damaged"):
        DatasetIndex.latest(str(tmp_path))


def test_a_file_keeps_the_other_names_it_has_until_it_changes(index_uri: str) -> None:
    one = make_row("a.png")
    other = replace(one, name="@set/a.png")
    DatasetIndex.publish(index_uri, [one])
    both = DatasetIndex.publish(index_uri, [other])
    assert both.rows() == [other, one]
    assert both.lookup("@set/a.png") == other
    changed = replace(one, image_key="2" * 64, etag="another")
    assert DatasetIndex.publish(index_uri, [changed]).rows() == [changed]


def slow_digest(index: DatasetIndex, asked: list[str]) -> str:
    """The digest by a look-up of each image."""
    rows = [index.lookup(image) for image in sorted(set(asked))]
    contents = sorted({(row.name, row.image_key, row.width, row.height, row.status) for row in rows})
    return hashlib.sha256(json.dumps(contents, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


def test_the_digest_is_that_of_single_look_ups(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("meteor.cache.index._ROWS_PER_PIECE", 3)
    rows = [make_row(f"{name}.png", root=root) for name in ("b", "a", "é", '"', "z") for root in ("/x", "/y")]
    rows += [make_bad_row("c.png"), make_row("d.png", root="/x"), make_row("d.png", root="/y", content="other")]
    index = DatasetIndex.publish(str(tmp_path), rows)
    names = ["z.png", "a.png", "é.png", '".png', "b.png", "c.png", "/x/d.png", "/y/d.png", "/x/a.png", "a.png"]
    for asked in (names, names[:3], ["c.png"], []):
        assert index.digest(asked) == slow_digest(index, asked)
        assert index.digest(pa.array(asked, pa.string())) == slow_digest(index, asked)
    with pytest.raises(CacheError, match=r"d\.png.*by URI"):
        index.digest([*names, "d.png"])


def test_rows_by_name_are_the_last_of_each_name(tmp_path) -> None:
    rows = [make_row("a.png", root="/x"), make_row("a.png", root="/y", content="other"), make_row("b.png")]
    index = DatasetIndex.publish(str(tmp_path), rows)
    found = index.rows_named(pa.array(["b.png", "a.png", "b.png", "z.png"]))
    assert dict(zip(found["name"].to_pylist(), found["image_key"].to_pylist(), strict=True)) == {
        "a.png": rows[1].image_key,
        "b.png": rows[2].image_key,
    }
    assert len(found) == 2


@pytest.mark.parametrize("odd", ["", 'a"b.png', "a\\b.png", "é.png", "\x7f.png", "\U0001f600.png", "tab\t.png"])
def test_the_digest_is_of_plain_json_whatever_the_names_hold(tmp_path, odd):
    names = sorted(["1.png", "[2],.png", *([odd] if odd else [])])
    rows = [IndexRow(name, f"/x/{i}", 1, "e", f"{i:064x}", 10 + i, 20, "ok") for i, name in enumerate(names)]
    index = DatasetIndex.publish(str(tmp_path / "index"), rows)
    content = [[row.name, row.image_key, row.width, row.height, row.status] for row in rows]
    expected = hashlib.sha256(json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()
    assert index.digest(names) == expected
