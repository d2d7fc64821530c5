"""Verification and repair: exactly what is damaged leaves, comes back when it is encoded again, and never by itself."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
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
from meteor.cache.manifest import latest_manifest, read_keys
from meteor.cache.table import versioned
from meteor.cache.upkeep.repair import repair
from meteor.cache.verify import Problem, find_problems
from meteor.errors import CacheError, StorageError
from meteor.features import ImageFeatures


@pytest.fixture
def cache_uri(make_identity, tmp_path: Path) -> str:
    return create_cache(str(tmp_path), make_identity(), "float16")


def write(cache_uri: str, *images: ImageFeatures) -> Path:
    """One data file."""
    record = write_feature_file(cache_uri, [encode_row(image, get_codec("float16")) for image in images])
    return Path(cache_uri, record.file)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 8
    file.write_bytes(content)


def rows_of(cache_uri: str) -> dict[str, dict]:
    table = read_keys(cache_uri, FeatureCache.open(cache_uri).manifest)
    return {row["image_key"]: row for row in table.to_pylist()}


def keys_of(*images: ImageFeatures) -> list[str]:
    return sorted(image.image_key for image in images)


@pytest.mark.parametrize("part", ["features", "cls_attention", "cls"])
def test_one_damaged_image_leaves_and_all_others_stay_where_they_are(cache_uri, make_image, part: str) -> None:
    images = [make_image(str(i), shape=i) for i in range(5)]
    file = write(cache_uri, *images[:3])
    write(cache_uri, *images[3:])
    commit(cache_uri)
    before = rows_of(cache_uri)
    flip(file, before[images[1].image_key][f"{part}_offset"])
    done = repair(cache_uri)
    assert (done.checked_version, done.version, done.dropped, done.notes) == (1, 2, (images[1].image_key,), ())
    assert {(problem.file, problem.image_key) for problem in done.problems} == {
        (f"data/{file.name}", images[1].image_key)
    }
    del before[images[1].image_key]
    assert rows_of(cache_uri) == before
    assert FeatureCache.open(cache_uri).verify() == []
    assert len(FeatureCache.open(cache_uri, version=1)) == 5


def test_a_file_that_is_gone_or_cut_short_takes_all_its_images_along(cache_uri, make_image) -> None:
    images = [make_image(str(i)) for i in range(6)]
    files = [write(cache_uri, *images[i : i + 2]) for i in (0, 2, 4)]
    commit(cache_uri)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-40])
    done = repair(cache_uri)
    assert list(done.dropped) == keys_of(*images[:4])
    assert [problem.image_key for problem in done.problems] == [None, None]
    assert FeatureCache.open(cache_uri).keys() == keys_of(*images[4:])
    assert FeatureCache.open(cache_uri).verify() == []
    assert "4 damaged images were removed" in done.to_text()
    assert json.loads(json.dumps(done.to_dict()))["problems"] == [str(problem) for problem in done.problems]


def test_a_file_of_another_cache_is_not_trusted(cache_uri, make_identity, make_image, tmp_path: Path) -> None:
    file = write(cache_uri, make_image("a"))
    commit(cache_uri)
    other = create_cache(str(tmp_path), make_identity(select_layer=-1), "float16")
    file.write_bytes(write(other, make_image("a")).read_bytes())
    done = repair(cache_uri)
    assert ["cache_key" in str(problem) for problem in done.problems] == [True]
    assert done.dropped == (make_image("a").image_key,)


def test_what_was_dropped_does_not_come_back_by_a_commit_but_by_being_encoded(cache_uri, make_image) -> None:
    file = write(cache_uri, make_image("a"))
    write(cache_uri, make_image("b"))
    commit(cache_uri)
    file.write_bytes(b"damaged")
    assert repair(cache_uri).version == 2
    assert commit(cache_uri) == 2
    write(cache_uri, make_image("c"))
    commit(cache_uri)
    assert FeatureCache.open(cache_uri).keys() == keys_of(make_image("b"), make_image("c"))
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    assert FeatureCache.open(cache_uri).keys() == keys_of(*map(make_image, "abc"))
    assert FeatureCache.open(cache_uri).verify() == []


def test_a_second_repair_and_one_of_an_intact_cache_change_nothing(cache_uri, make_image) -> None:
    file = write(cache_uri, make_image("a"), make_image("b"))
    commit(cache_uri)
    done = repair(cache_uri)
    assert (done.version, done.problems, done.dropped) == (1, (), ())
    assert "nothing to change" in done.to_text()
    file.unlink()
    assert repair(cache_uri).version == 2
    assert (repair(cache_uri).version, repair(cache_uri).problems) == (2, ())


def test_a_writer_that_commits_during_a_repair_loses_nothing(cache_uri, make_image, monkeypatch) -> None:
    file = write(cache_uri, make_image("a"), make_image("b"))
    commit(cache_uri)
    flip(file, rows_of(cache_uri)[make_image("a").image_key]["features_offset"])
    real = storage.create_bytes

    def lose_once(uri: str, data: bytes) -> None:
        # Meanwhile the damaged image was encoded again with one more layer, elsewhere.
        monkeypatch.setattr(storage, "create_bytes", real)
        write(cache_uri, make_image("a", layers=(-2, -5)), make_image("c"))
        assert commit(cache_uri) == 2
        real(uri, data)

    monkeypatch.setattr(storage, "create_bytes", lose_once)
    repair(cache_uri)
    cache = FeatureCache.open(cache_uri)
    assert cache.keys() == keys_of(*map(make_image, "abc"))
    assert cache.get(make_image("a").image_key).attention_layers == (-2, -5)
    assert cache.verify() == []


@pytest.mark.parametrize("part", ["keys", "quarantine", "manifest"])
def test_a_version_that_cannot_be_read_is_made_again_from_the_ledger(cache_uri, make_image, part: str) -> None:
    images = [make_image(str(i)) for i in range(4)]
    file = write(cache_uri, *images[:2])
    write(cache_uri, *images[2:])
    bad = QuarantineRow("", "gone.png", "empty", "0 bytes", "/data/gone.png", 0)
    record_quarantine(cache_uri, [bad])
    commit(cache_uri)
    file.unlink()
    assert repair(cache_uri).version == 2
    manifest = FeatureCache.open(cache_uri).manifest
    name = {"keys": manifest.keys, "quarantine": manifest.quarantine, "manifest": "manifests/v00000002.json"}[part]
    Path(cache_uri, name).write_bytes(Path(cache_uri, name).read_bytes()[:-9])
    with pytest.raises(CacheError):
        commit(cache_uri) if write(cache_uri, make_image("new")) else None
    done = repair(cache_uri)
    assert ["version 2 cannot be read" in note and "from the ledger" in note for note in done.notes] == [True]
    # The ledger still names the file that is gone, so its images are found missing once more.
    assert list(done.dropped) == keys_of(*images[:2])
    cache = FeatureCache.open(cache_uri)
    assert cache.keys() == keys_of(*images[2:], make_image("new"))
    assert cache.quarantine() == [bad]
    assert cache.verify() == []
    assert repair(cache_uri).version == done.version


def test_a_damaged_ledger_record_is_reported_and_its_images_are_served(cache_uri, make_image) -> None:
    for name in "ab":
        write(cache_uri, make_image(name))
    commit(cache_uri)
    first, second = sorted(Path(cache_uri, "ledger").iterdir())
    flip(first, 60)
    second.unlink()
    done = repair(cache_uri)
    assert done.version == 1
    assert [first.name in done.notes[0], second.name.removeprefix("features-") in done.notes[1]] == [True, True]
    assert FeatureCache.open(cache_uri).verify() == []


def test_a_damaged_record_that_is_not_merged_stops_no_commit_after_a_repair(cache_uri, make_image) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    lost = write(cache_uri, make_image("b"))
    Path(cache_uri, "ledger", f"features-{lost.name}").write_bytes(b"damaged")
    with pytest.raises(CacheError, match="verify --repair"):
        commit(cache_uri)
    done = repair(cache_uri)
    assert done.version == 2
    assert lost.name in done.notes[0]
    write(cache_uri, make_image("b"))
    assert commit(cache_uri) == 3
    assert FeatureCache.open(cache_uri).keys() == keys_of(make_image("a"), make_image("b"))


@pytest.mark.parametrize("folder", ["keys", "ledger", "manifests"])
def test_what_a_newer_release_wrote_is_not_taken_for_damage(cache_uri, make_image, folder: str) -> None:
    write(cache_uri, make_image("a"))
    commit(cache_uri)
    if folder == "ledger":
        write(cache_uri, make_image("b"))
    for file in Path(cache_uri, folder).iterdir():
        if folder == "manifests":
            file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 99'))
        else:
            table = pq.read_table(file)
            pq.write_table(versioned_table(table, 99), file)
    with pytest.raises(CacheError, match=r"99.*newer"):
        repair(cache_uri)
    assert latest_manifest(cache_uri) == 1


def versioned_table(table: pa.Table, schema_version: int) -> pa.Table:
    return table.replace_schema_metadata(versioned(table.schema, schema_version).metadata)


def test_a_store_that_does_not_answer_loses_no_image(cache_uri, make_image, monkeypatch) -> None:
    file = write(cache_uri, make_image("a"))
    commit(cache_uri)
    real = storage.read_bytes

    def refusing(uri: str) -> bytes:
        if file.name in uri and "/data/" in uri:
            raise StorageError(f"{uri}: 503 slow down")
        return real(uri)

    monkeypatch.setattr(storage, "read_bytes", refusing)
    done = repair(cache_uri)
    assert (done.version, done.dropped) == (1, ())
    assert "503" in done.to_text()
    assert "1 files could not be read from the store and are kept" in done.to_text()


def test_nothing_to_repair_says_what_to_do(cache_uri, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no committed version"):
        repair(cache_uri)
    with pytest.raises(CacheError, match="no feature cache"):
        repair(str(tmp_path / "nothing"))
    assert latest_manifest(cache_uri) == 0


def test_progress_is_told_and_memory_is_bounded_by_reading_fewer_files_at_once(
    cache_uri, make_image, monkeypatch
) -> None:
    files = [write(cache_uri, make_image(str(i))) for i in range(5)]
    commit(cache_uri)
    flip(files[3], rows_of(cache_uri)[make_image("3").image_key]["cls_offset"])
    real, reading, most = storage.read_bytes, [], []

    def counted(uri: str) -> bytes:
        reading.append(uri)
        most.append(len(reading))
        # Long enough that files read at once would meet here.
        time.sleep(0.02)
        data = real(uri)
        reading.remove(uri)
        return data

    keys = read_keys(cache_uri, FeatureCache.open(cache_uri).manifest)
    monkeypatch.setattr(storage, "read_bytes", counted)
    told: list[tuple[int, int]] = []

    def found(max_bytes: int, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        return find_problems(cache_uri, keys, get_codec("float16"), on_progress=progress, max_bytes=max_bytes)

    alone = found(1, lambda *counts: told.append(counts))
    assert max(most) == 1
    assert told == [(done, 5) for done in range(1, 6)]
    assert {problem.image_key for problem in alone} == {make_image("3").image_key}
    assert found(1 << 30) == alone
