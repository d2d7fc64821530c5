"""Clean-up: what goes, what stays, and that a reader of a version that stays never notices. On disk and on S3."""

import json
import os
from collections.abc import Collection
from pathlib import Path

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
    record_quarantine,
    write_feature_file,
)
from meteor.cache.pins import pins, unpin
from meteor.cache.upkeep.gc import plan_gc, run_gc
from meteor.cache.upkeep.gc_plan import GcPlan
from meteor.cache.upkeep.repair import repair
from meteor.errors import CacheError, StorageError
from meteor.features import ImageFeatures

HOUR_S = 3600.0


@pytest.fixture
def cache_uri(make_identity, tmp_path: Path) -> str:
    return create_cache(str(tmp_path), make_identity(), "float16")


@pytest.fixture
def anywhere(make_identity, root: str) -> str:
    return create_cache(root, make_identity(), "float16")


def write(cache_uri: str, *images: ImageFeatures) -> str:
    return write_feature_file(cache_uri, [encode_row(image, get_codec("float16")) for image in images]).file


def listed(cache_uri: str) -> set[str]:
    return {info.uri[len(cache_uri) + 1 :] for info in storage.list_objects(cache_uri)}


def plan_later(cache_uri: str, *, hours: float = 25) -> GcPlan:
    """The plan, some hours after everything was written."""
    return plan_gc(cache_uri, now_s=storage.now_s(cache_uri) + hours * HOUR_S)


def deleted(plan: GcPlan) -> dict[str, str]:
    return {deletion.file: deletion.reason for deletion in plan.deletions}


def assert_readable(cache_uri: str, images: Collection[ImageFeatures], version: int | None = None) -> None:
    cache = FeatureCache.open(cache_uri, version=version)
    assert cache.keys() == sorted(image.image_key for image in images)
    assert cache.verify() == []


def test_nothing_young_is_touched_and_nothing_of_the_latest_version_ever(anywhere, make_image) -> None:
    images = [make_image("a"), make_image("b")]
    write(anywhere, images[0])
    commit(anywhere)
    write(anywhere, images[1])
    commit(anywhere)
    storage.write_bytes(storage.join(anywhere, "data", "orphan.parquet"), b"x")
    before = listed(anywhere)
    assert plan_later(anywhere, hours=23).is_empty
    plan = plan_later(anywhere)
    assert set(deleted(plan)) == {
        "manifests/v00000001.json",
        FeatureCache.open(anywhere, version=1).manifest.keys,
        FeatureCache.open(anywhere, version=1).manifest.quarantine,
        "data/orphan.parquet",
    }
    assert listed(anywhere) == before
    report = run_gc(plan)
    assert (report.num_deleted, report.deleted_bytes, report.version) == (4, plan.deleted_bytes, 2)
    assert listed(anywhere) == before - set(deleted(plan))
    assert_readable(anywhere, images)
    assert plan_later(anywhere).is_empty
    assert run_gc(plan).num_deleted == 0


def test_what_the_next_commit_will_merge_stays_however_old(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    record_quarantine(cache_uri, [QuarantineRow("", "gone.png", "empty", "0 bytes")])
    assert plan_later(cache_uri, hours=1000).is_empty
    commit(cache_uri)
    write(cache_uri, make_image("b"))
    run_gc(plan_later(cache_uri, hours=1000))
    assert commit(cache_uri) == 2
    assert_readable(cache_uri, [make_image("a"), make_image("b")])
    assert FeatureCache.open(cache_uri).quarantined() == {"gone.png": "empty"}


def test_a_pinned_version_stays_with_all_it_names_until_it_is_unpinned(cache_uri, make_image) -> None:
    narrow, wide = make_image("a"), make_image("a", layers=(-2, -5))
    old_file = write(cache_uri, narrow)
    commit(cache_uri)
    FeatureCache.open(cache_uri).pin("run", {"index_digest": "1"})
    new_file = write(cache_uri, wide)
    commit(cache_uri)
    [pin] = pins(cache_uri)
    assert {name: pin[name] for name in ("run_digest", "manifest_version", "index_digest")} == {
        "run_digest": "run",
        "manifest_version": 1,
        "index_digest": "1",
    }
    plan = plan_later(cache_uri)
    assert plan.is_empty
    assert dict(plan.kept_versions) == {2: "the latest", 1: "pinned by run"}
    unpin(cache_uri, "run")
    assert pins(cache_uri) == []
    with pytest.raises(CacheError, match="no pin of run 'run'"):
        unpin(cache_uri, "run")
    record = old_file.replace("data/", "ledger/features-")
    plan = plan_later(cache_uri)
    assert deleted(plan)[old_file] == deleted(plan)[record] == "all rows shadowed or dropped"
    run_gc(plan)
    assert not {old_file, record} & listed(cache_uri)
    assert new_file in listed(cache_uri)
    assert_readable(cache_uri, [wide])
    write(cache_uri, make_image("b"))
    assert commit(cache_uri) == 3
    assert_readable(cache_uri, [wide, make_image("b")])


def test_a_version_stays_as_long_after_it_was_superseded_as_a_reader_may_take(
    cache_uri, make_image, monkeypatch
) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    real = storage.list_objects

    def version_1_is_old(uri: str) -> list[storage.ObjectInfo]:
        # Written long ago and superseded just now.
        return [
            storage.ObjectInfo(info.uri, info.size_bytes, info.etag, 0.0) if "v00000001" in info.uri else info
            for info in real(uri)
        ]

    monkeypatch.setattr(storage, "list_objects", version_1_is_old)
    plan = plan_gc(cache_uri)
    assert plan.is_empty
    assert dict(plan.kept_versions)[1] == "superseded a short while ago"


def test_tables_of_a_commit_that_lost_its_race_and_files_of_writers_that_crashed_go(
    cache_uri, make_image, monkeypatch
) -> None:
    write(cache_uri, make_image("a"))
    with monkeypatch.context() as broken:
        broken.setattr(storage, "create_bytes", lambda uri, data: (_ for _ in ()).throw(StorageError("pulled")))
        with pytest.raises(StorageError, match="pulled"):
            commit(cache_uri)
    lost = {file for file in listed(cache_uri) if file.startswith(("keys/", "quarantine/"))}
    commit(cache_uri)
    orphan = write(cache_uri, make_image("b"))
    storage.delete(storage.join(cache_uri, orphan.replace("data/", "ledger/features-")))
    plan = plan_later(cache_uri)
    assert deleted(plan) == {
        **dict.fromkeys(lost, "no kept version names it"),
        orphan: "its writer never finished it",
    }
    assert len(lost) == 2
    run_gc(plan)
    assert_readable(cache_uri, [make_image("a")])


def test_living_rows_leave_a_file_of_many_dead_ones_and_the_file_goes_later(anywhere, make_image) -> None:
    images = [make_image(str(i), shape=i) for i in range(6)]
    mixed = write(anywhere, *images[:4])
    full = write(anywhere, *images[4:])
    commit(anywhere)
    wide = [make_image(str(i), shape=i, layers=(-2, -5)) for i in range(2)]
    write(anywhere, *wide)
    commit(anywhere)
    plan = plan_later(anywhere)
    assert [compaction.file for compaction in plan.compactions] == [mixed]
    sizes = {row["image_key"]: row for row in rows_of(anywhere, version=1)}
    assert plan.compactions[0].dead_bytes == sum(
        sizes[image.image_key][f"{part}_size"] for image in wide for part in ("features", "cls_attention", "cls")
    )
    report = run_gc(plan)
    assert (report.num_compacted, report.version, report.notes) == (1, 3, ())
    assert_readable(anywhere, images)
    moved = {row["image_key"]: row["file"] for row in rows_of(anywhere)}
    assert mixed not in moved.values()
    assert moved[images[2].image_key] == moved[images[3].image_key] != full
    assert moved[images[4].image_key] == full
    assert FeatureCache.open(anywhere).get(images[0].image_key).attention_layers == (-2, -5)
    assert mixed in listed(anywhere)
    later = plan_later(anywhere)
    assert deleted(later)[mixed] == "all rows shadowed or dropped"
    assert not later.compactions
    run_gc(later)
    assert mixed not in listed(anywhere)
    assert_readable(anywhere, images)
    assert plan_later(anywhere).is_empty


def test_rows_of_a_calibrated_codec_move_as_they_are(make_identity, make_image, tmp_path: Path) -> None:
    cache_uri = create_cache(str(tmp_path), make_identity(), "int8")
    images = [make_image("a"), make_image("b", shape=1)]
    codec = calibrate(cache_uri, images)
    write_feature_file(cache_uri, [encode_row(image, codec) for image in images])
    commit(cache_uri)
    key = images[1].image_key
    before, measured = FeatureCache.open(cache_uri).get(key), relative_errors(cache_uri)[key]
    write_feature_file(cache_uri, [encode_row(make_image("a", layers=(-2, -5)), codec)])
    commit(cache_uri)
    assert run_gc(plan_later(cache_uri)).num_compacted == 1
    assert_readable(cache_uri, images)
    after = FeatureCache.open(cache_uri).get(key)
    assert all(map(torch.equal, after.features, before.features))
    assert relative_errors(cache_uri)[key] == measured > 0


def relative_errors(cache_uri: str) -> dict[str, float]:
    return {row["image_key"]: row["relative_error"] for row in rows_of(cache_uri)}


def rows_of(cache_uri: str, version: int | None = None) -> list[dict]:
    from meteor.cache.manifest import read_keys

    return read_keys(cache_uri, FeatureCache.open(cache_uri, version=version).manifest).to_pylist()


def test_a_file_with_few_dead_rows_and_one_that_a_pin_keeps_are_not_written_again(cache_uri, make_image) -> None:
    write(cache_uri, *(make_image(str(i)) for i in range(10)))
    commit(cache_uri)
    for i in range(2):
        write(cache_uri, make_image(str(i), layers=(-2, -5)))
    commit(cache_uri)
    assert not plan_later(cache_uri).compactions
    FeatureCache.open(cache_uri).pin("run", {})
    write(cache_uri, make_image("2", layers=(-2, -5)))
    commit(cache_uri)
    assert not plan_later(cache_uri).compactions
    unpin(cache_uri, "run")
    assert len(plan_later(cache_uri).compactions) == 1


def test_a_damaged_file_is_not_written_again_and_that_is_said(cache_uri, make_image) -> None:
    file = write(cache_uri, make_image("a"), make_image("b"))
    commit(cache_uri)
    write(cache_uri, make_image("a", layers=(-2, -5)))
    commit(cache_uri)
    [row] = [row for row in rows_of(cache_uri) if row["file"] == file]
    uri = storage.join(cache_uri, file)
    content = bytearray(storage.read_bytes(uri))
    content[row["features_offset"]] ^= 1
    storage.write_bytes(uri, content)
    report = run_gc(plan_later(cache_uri))
    assert report.num_compacted == 0
    assert [file in note and "verify" in note for note in report.notes] == [True]
    assert len(FeatureCache.open(cache_uri)) == 2


def test_what_became_needed_after_the_plan_stays(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    first = FeatureCache.open(cache_uri)
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    plan = plan_later(cache_uri)
    assert len(plan.deletions) == 3
    first.pin("run", {})
    report = run_gc(plan)
    assert report.num_deleted == 0
    assert "3 files" in report.notes[0]
    assert_readable(cache_uri, [make_image("a")], version=1)


def test_a_version_that_is_pinned_while_it_is_deleted_comes_back(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    first = FeatureCache.open(cache_uri)
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    real = storage.delete

    def pin_first(uri: str) -> None:
        monkeypatch.setattr(storage, "delete", real)
        first.pin("run", {})
        real(uri)

    plan = plan_later(cache_uri)
    monkeypatch.setattr(storage, "delete", pin_first)
    with pytest.raises(CacheError, match="run pinned version 1 while"):
        run_gc(plan)
    assert_readable(cache_uri, [make_image("a")], version=1)
    assert plan_later(cache_uri).is_empty


def test_a_version_to_be_kept_that_cannot_be_read_stops_everything(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    storage.write_bytes(storage.join(cache_uri, FeatureCache.open(cache_uri).manifest.keys), b"damaged")
    before = listed(cache_uri)
    with pytest.raises(CacheError, match=r"version 1 must be kept.*verify --repair"):
        plan_later(cache_uri)
    storage.write_bytes(storage.join(cache_uri, "pins", "run.json"), b"{")
    with pytest.raises(StorageError, match=r"run\.json"):
        plan_later(cache_uri)
    assert before < listed(cache_uri)


def test_the_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "data" / "precious.parquet"), b"x")
    with pytest.raises(CacheError, match="no feature cache"):
        plan_gc(str(tmp_path))


def test_images_dropped_by_a_repair_make_their_file_a_case_for_gc(cache_uri, make_image) -> None:
    file = write(cache_uri, make_image("a"))
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    storage.write_bytes(storage.join(cache_uri, file), b"damaged")
    assert repair(cache_uri).dropped == (make_image("a").image_key,)
    plan = plan_later(cache_uri)
    assert deleted(plan)[file] == "all rows shadowed or dropped"
    run_gc(plan)
    assert_readable(cache_uri, [make_image("b")])
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    assert_readable(cache_uri, [make_image("a"), make_image("b")])


def test_unfinished_writes_go_when_they_are_old(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    old, young = (Path(cache_uri, "data", f".partial-{name}") for name in ("old", "young"))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    plan = plan_gc(cache_uri)
    assert plan.leftovers == (str(old),)
    assert old.exists()
    assert run_gc(plan).num_leftovers == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_each_file_goes_after_what_names_it(cache_uri, make_image, monkeypatch) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    write(cache_uri, make_image("a", layers=(-2, -5)))
    commit(cache_uri)
    real, order = storage.delete, []
    monkeypatch.setattr(
        storage, "delete", lambda uri: (order.append(uri[len(cache_uri) + 1 :].split("/")[0]), real(uri))
    )
    run_gc(plan_later(cache_uri))
    assert order == ["manifests", "keys", "quarantine", "ledger", "data"]


def test_a_plan_says_what_and_why(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    plan = plan_later(cache_uri)
    assert json.loads(json.dumps(plan.to_dict()))["deleted_bytes"] == plan.deleted_bytes
    text = plan.to_text()
    assert "keep version 2: the latest" in text
    assert "delete 1 in manifests: superseded version" in text
    assert "younger than 24 hours" in text
    assert "nothing to do" in plan_gc(cache_uri).to_text()
    report = run_gc(plan)
    assert report.to_text().startswith("deleted 3 files")
    assert report.to_dict()["num_deleted"] == 3
