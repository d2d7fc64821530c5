"""Publishing: nothing half is ever seen, nothing finished is lost, every image has one winner. On disk and on S3."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from meteor import storage
from meteor.cache import (
    FeatureCache,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.manifest import publish_edit
from meteor.cache.merging import merge_keys
from meteor.cache.quarantine import merge_quarantine, quarantine_rows, quarantine_table, retryable
from meteor.cache.table import read_table, table_bytes, versioned
from meteor.errors import AlreadyExistsError, CacheError, StorageError
from meteor.features import ImageFeatures


@pytest.fixture
def cache_uri(make_identity, root: str) -> str:
    return create_cache(root, make_identity(), "float16")


@pytest.fixture
def disk_uri(make_identity, tmp_path: Path) -> str:
    return create_cache(str(tmp_path / "disk"), make_identity(), "float16")


def write(cache_uri: str, *images: ImageFeatures) -> None:
    write_feature_file(cache_uri, [encode_row(image, get_codec("float16")) for image in images])


def fail_on(monkeypatch: pytest.MonkeyPatch, function: str, part: str) -> None:
    """Let the writes of files under one folder fail from here on, as if the process had died before them."""
    real = getattr(storage, function)

    def failing(uri: str, data: bytes) -> None:
        if f"/{part}/" in uri:
            raise StorageError(f"{uri}: the plug was pulled")
        real(uri, data)

    monkeypatch.setattr(storage, function, failing)


def test_a_data_file_without_its_ledger_record_does_not_count(cache_uri, make_image, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        fail_on(broken, "write_bytes", "ledger")
        with pytest.raises(StorageError, match="plug"):
            write(cache_uri, make_image("a"))
    assert len(storage.list_objects(storage.join(cache_uri, "data"))) == 1
    assert commit(cache_uri) == 0
    write(cache_uri, make_image("b"))
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("b").image_key]


def test_a_finished_file_is_adopted_after_a_crash_before_the_manifest(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    with monkeypatch.context() as broken:
        fail_on(broken, "create_bytes", "manifests")
        with pytest.raises(StorageError, match="plug"):
            commit(cache_uri)
    with pytest.raises(CacheError, match="no committed version"):
        FeatureCache.open(cache_uri)
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("a").image_key]


def test_versions_grow_and_old_ones_stay_readable(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"), make_image("b", shape=1))
    assert commit(cache_uri) == 1
    assert commit(cache_uri) == 1
    write(cache_uri, make_image("c"))
    assert commit(cache_uri) == 2
    assert len(FeatureCache.open(cache_uri)) == 3
    assert len(FeatureCache.open(cache_uri, version=1)) == 2
    assert len(storage.list_objects(storage.join(cache_uri, "manifests"))) == 2


def files_read(cache: FeatureCache, image: ImageFeatures, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    files, read_range_into = [], storage.read_range_into

    def noting(uri: str, start: int, buffer: bytearray) -> None:
        files.append(uri)
        read_range_into(uri, start, buffer)

    with monkeypatch.context() as noted:
        noted.setattr(storage, "read_range_into", noting)
        cache.get(image.image_key)
    return files


def test_of_two_rows_for_one_image_the_committed_one_stays(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"), make_image("a"))
    commit(cache_uri)
    first = FeatureCache.open(cache_uri)
    assert (len(first), first.manifest.num_shadowed) == (1, 1)
    write(cache_uri, make_image("a"), make_image("b"))
    commit(cache_uri)
    second = FeatureCache.open(cache_uri)
    assert (len(second), second.manifest.num_shadowed) == (2, 2)
    assert files_read(first, make_image("a"), monkeypatch) == files_read(second, make_image("a"), monkeypatch)
    assert second.verify() == []


def test_a_row_with_the_attention_of_more_layers_replaces_one_with_fewer(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a", layers=(-2,)), make_image("b", layers=(-2, -5)))
    commit(cache_uri)
    write(cache_uri, make_image("a", layers=(-5, -2)), make_image("b", layers=(-5, -7)))
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    assert cache.get(make_image("a").image_key).attention_layers == (-5, -2)
    assert cache.get(make_image("b").image_key).attention_layers == (-2, -5)
    assert cache.manifest.num_shadowed == 2


def test_writers_that_commit_at_once_lose_nothing_and_double_nothing(cache_uri, make_image) -> None:
    num_writers, num_files = 4, 3
    barrier = threading.Barrier(num_writers)

    def work(writer: int) -> int:
        version = 0
        for file in range(num_files):
            write(cache_uri, make_image("everyone's"), make_image(f"{writer}-{file}", shape=file))
            barrier.wait()
            version = commit(cache_uri)
        return version

    with ThreadPoolExecutor(num_writers) as pool:
        versions = list(pool.map(work, range(num_writers)))
    cache = FeatureCache.open(cache_uri)
    images = {make_image(f"{writer}-{file}") for writer in range(num_writers) for file in range(num_files)}
    assert cache.keys() == sorted({make_image("everyone's").image_key, *(image.image_key for image in images)})
    assert cache.version == max(versions)
    assert cache.manifest.num_shadowed == num_writers * num_files - 1
    published = [info.uri for info in storage.list_objects(storage.join(cache_uri, "manifests"))]
    assert len(published) == cache.version
    assert cache.verify() == []


def test_a_put_that_succeeded_but_reported_a_lost_race_commits_once(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    real = storage.create_bytes

    def answer_lost(uri: str, data: bytes) -> None:
        real(uri, data)
        raise AlreadyExistsError(uri)

    monkeypatch.setattr(storage, "create_bytes", answer_lost)
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).keys() == [make_image("a").image_key]


def test_a_writer_that_always_loses_gives_up_with_an_error(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))

    def lose(uri: str, data: bytes) -> None:
        raise AlreadyExistsError(uri)

    monkeypatch.setattr(storage, "create_bytes", lose)
    monkeypatch.setattr("meteor.cache.table._MAX_PAUSE_S", 0.0)
    monkeypatch.setattr("meteor.cache.table._MAX_PUBLISH_ATTEMPTS", 3)
    with pytest.raises(CacheError, match="3 attempts"):
        commit(cache_uri)


def test_quarantined_images_are_merged_and_leave_once_encoded(cache_uri, make_image) -> None:
    key = make_image("late").image_key
    record_quarantine(cache_uri, [])
    assert commit(cache_uri) == 0
    record_quarantine(
        cache_uri,
        [
            QuarantineRow(key, "images/late.png", "non_finite_features", "NaN"),
            QuarantineRow("", "images/gone.png", "empty", "0 bytes"),
        ],
    )
    assert commit(cache_uri) == 1
    assert FeatureCache.open(cache_uri).quarantined() == {key: "non_finite_features", "images/gone.png": "empty"}
    assert len(FeatureCache.open(cache_uri)) == 0
    record_quarantine(cache_uri, [QuarantineRow("", "images/gone.png", "truncated", "half")])
    write(cache_uri, make_image("late"))
    assert commit(cache_uri) == 2
    cache = FeatureCache.open(cache_uri)
    assert cache.quarantined() == {"images/gone.png": "truncated"}
    assert cache.quarantine() == [QuarantineRow("", "images/gone.png", "truncated", "half")]
    assert cache.keys() == [key]
    record_quarantine(cache_uri, [QuarantineRow(key, "images/late.png", "truncated", "again")])
    commit(cache_uri)
    assert FeatureCache.open(cache_uri).quarantined() == {"images/gone.png": "truncated"}


def test_rows_that_an_edit_drops_stay_out_of_later_versions(disk_uri, make_image) -> None:
    write(disk_uri, make_image("a"), make_image("b"))
    commit(disk_uri)
    write(disk_uri, make_image("c"))
    dropped = make_image("a").image_key

    def drop(keys: pa.Table) -> pa.Table:
        return keys.filter(pc.not_equal(keys["image_key"], dropped))

    assert publish_edit(disk_uri, drop) == 2
    assert publish_edit(disk_uri, drop) == 2
    assert commit(disk_uri) == 2
    write(disk_uri, make_image("d"))
    assert commit(disk_uri) == 3
    cache = FeatureCache.open(disk_uri)
    assert cache.keys() == sorted(make_image(name).image_key for name in "bcd")
    assert cache.manifest.num_shadowed == 0
    write(disk_uri, make_image("a"))
    commit(disk_uri)
    assert dropped in FeatureCache.open(disk_uri)


def test_an_edit_that_loses_a_race_is_made_on_the_winners_version(disk_uri, make_image, monkeypatch) -> None:
    write(disk_uri, make_image("a"), make_image("b"))
    commit(disk_uri)
    real, seen = storage.create_bytes, []

    def lose_once(uri: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "create_bytes", real)
        write(disk_uri, make_image("c"))
        assert commit(disk_uri) == 2
        real(uri, data)

    monkeypatch.setattr(storage, "create_bytes", lose_once)
    assert publish_edit(disk_uri, lambda keys: (seen.append(keys.num_rows), keys.slice(0, 1))[1]) == 3
    assert seen == [2, 3]
    assert FeatureCache.open(disk_uri).keys() == sorted(make_image(name).image_key for name in "abc")[:1]


def test_a_pending_row_takes_the_place_of_one_that_an_edit_drops(disk_uri, make_image) -> None:
    write(disk_uri, make_image("a"))
    commit(disk_uri)
    write(disk_uri, make_image("a"))
    assert publish_edit(disk_uri, lambda keys: keys.slice(0, 0)) == 2
    cache = FeatureCache.open(disk_uri)
    assert cache.keys() == [make_image("a").image_key]
    assert cache.manifest.num_shadowed == 0
    assert cache.verify() == []


def test_names_of_records_that_are_gone_leave_the_manifest(disk_uri, make_image) -> None:
    write(disk_uri, make_image("a"))
    commit(disk_uri)
    [gone] = FeatureCache.open(disk_uri).manifest.records
    storage.delete(storage.join(disk_uri, "ledger", gone))
    assert commit(disk_uri) == 1
    write(disk_uri, make_image("b"))
    assert commit(disk_uri) == 2
    cache = FeatureCache.open(disk_uri)
    assert gone not in cache.manifest.records
    assert len(cache.manifest.records) == 1
    assert len(cache) == 2


def test_a_damaged_record_stops_a_commit_and_says_what_to_do(disk_uri, make_image) -> None:
    write(disk_uri, make_image("a"))
    [record] = Path(disk_uri, "ledger").iterdir()
    record.write_bytes(record.read_bytes()[:-30])
    with pytest.raises(CacheError, match=rf"1 ledger records are damaged.*{record.name}.*verify --repair"):
        commit(disk_uri)


def test_a_manifest_counts_sub_images_and_quarantined_images(disk_uri, make_image) -> None:
    write(disk_uri, make_image("a", shape=0), make_image("b", shape=1), make_image("c", shape=2))
    record_quarantine(disk_uri, [QuarantineRow("", f"{i}.png", "empty", "") for i in range(2)])
    commit(disk_uri)
    cache = FeatureCache.open(disk_uri)
    assert (cache.manifest.num_sub_images, cache.manifest.num_quarantined) == (1 + 3 + 4, 2)
    assert cache.num_sub_images == 8


def slowly_merged(tables: Sequence[pa.Table]) -> list[dict]:
    winners: dict[str, dict] = {}
    for row in pa.concat_tables(tables).to_pylist():
        held = winners.setdefault(row["image_key"], row)
        if set(row["attention_layers"]) > set(held["attention_layers"]):
            winners[row["image_key"]] = row
    return [winners[key] for key in sorted(winners)]


def test_merged_keys_are_those_of_a_loop_over_all_rows() -> None:
    schema = pa.schema(
        [
            pa.field("image_key", pa.string(), nullable=False),
            pa.field("attention_layers", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
        ]
    )
    chance = random.Random(0)
    for _ in range(50):
        rows = [
            {
                "image_key": f"{chance.randrange(12):02}",
                "attention_layers": chance.sample([-2, -5, -7, -22], chance.randrange(1, 4)),
                "row": row,
            }
            for row in range(chance.randrange(40))
        ]
        cut = chance.randrange(len(rows) + 1)
        held = merge_keys(pa.Table.from_pylist(rows[:cut], schema=schema), [])
        pending = [pa.Table.from_pylist(rows[i : i + 5], schema=schema) for i in range(cut, len(rows), 5)]
        assert merge_keys(held, pending).to_pylist() == slowly_merged([held, *pending])


def test_merged_quarantine_is_that_of_a_loop_over_all_rows() -> None:
    chance = random.Random(1)
    for _ in range(50):
        tables = [
            quarantine_table(
                QuarantineRow(
                    chance.choice(["", "k1", "k2", "k3"]), chance.choice(["", "n1", "n2"]), f"{t}-{i}", "", "u", i
                )
                for i in range(chance.randrange(6))
            )
            for t in range(4)
        ]
        encoded = chance.sample(["k1", "k2", "k3"], 1)
        expected = {row.key: row for table in tables for row in quarantine_rows(table)}
        merged = quarantine_rows(merge_quarantine(tables[0], tables[1:], pa.chunked_array([encoded])))
        assert merged == [expected[key] for key in sorted(expected) if key not in encoded]


def test_a_quarantine_table_of_an_older_release_is_read_and_extended(disk_uri) -> None:
    names = ["image_key", "name", "reason", "message"]
    schema = versioned(pa.schema([pa.field(name, pa.string(), nullable=False) for name in names]), 1)
    old = pa.Table.from_pylist([dict(zip(names, ["", "a.png", "empty", "0 bytes"], strict=True))], schema=schema)
    storage.write_bytes(storage.join(disk_uri, "ledger", "quarantine-1.parquet"), table_bytes(old))
    new = QuarantineRow("f" * 64, "b.png", "truncated", "half", "/data/b.png", 17)
    record_quarantine(disk_uri, [new])
    commit(disk_uri)
    rows = FeatureCache.open(disk_uri).quarantine()
    assert rows == [QuarantineRow("", "a.png", "empty", "0 bytes", "", 0), new]


def test_only_reasons_that_say_nothing_about_the_bytes_are_tried_again() -> None:
    again = {"missing", "changed", "aspect_ratio", "too_many_pixels", "inaccessible", "failed"}
    never = {"truncated", "not_an_image", "unreadable", "empty", "non_finite_features"}
    assert {reason for reason in again | never if retryable(reason)} == again


def test_a_column_that_must_be_there_is_missed_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    fields = [pa.field("a", pa.int64()), pa.field("b", pa.int64()), pa.field("c", pa.int64(), nullable=False)]
    uri = str(tmp_path / "t.parquet")
    with pytest.raises(CacheError, match=r"t\.parquet lacks the columns \['c'\]"):
        read_table(uri, versioned(pa.schema(fields), 1), advice="")
    assert read_table(uri, versioned(pa.schema(fields[:2]), 1), advice="").to_pylist() == [{"a": 1, "b": None}]
