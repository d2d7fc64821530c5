"""The node's disk in front of S3: hits, limits, damage, full disks, and files that other people delete."""

import errno
import fcntl
import logging
import os
import pickle
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meteor import storage
from meteor.cache import FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.cache.disk_tier import DiskTier
from meteor.errors import CorruptPayloadError, StorageError

SIZE_BYTES = 1000
FILE_ID = "0123456789abcdef" * 2


def content(offset: int, size_bytes: int = SIZE_BYTES) -> memoryview:
    return memoryview(random.Random(offset).randbytes(size_bytes))


def read(tier: DiskTier, offset: int, size_bytes: int = SIZE_BYTES, *, file_id: str = FILE_ID) -> bytes | None:
    buffer = bytearray(size_bytes)
    return bytes(buffer) if tier.read_into(file_id, offset, memoryview(buffer)) else None


def payload_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob(f"{FILE_ID[:2]}*/*") if path.is_file())


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in payload_files(folder))


def age(folder: Path, offset: int, seconds: float) -> None:
    [path] = [path for path in payload_files(folder) if path.name == f"{FILE_ID}-{offset}"]
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def make_tier(tmp_path: Path) -> Callable[..., DiskTier]:
    def make(limit_bytes: int = 10 * SIZE_BYTES) -> DiskTier:
        return DiskTier(str(tmp_path), limit_bytes)

    return make


def test_what_was_written_is_read_by_every_process(make_tier) -> None:
    tier = make_tier()
    assert read(tier, 4) is None
    tier.write(FILE_ID, 4, content(4))
    for reader in (tier, make_tier(), pickle.loads(pickle.dumps(tier))):
        assert read(reader, 4) == content(4)
        assert read(reader, 5) is None
        assert read(reader, 4, file_id="f" * 32) is None


def test_the_least_recently_used_leave_when_the_limit_is_reached(make_tier, tmp_path: Path) -> None:
    tier = make_tier(5 * SIZE_BYTES)
    for offset in range(5):
        tier.write(FILE_ID, offset, content(offset))
        age(tmp_path, offset, 1000 - offset)
    # A hit makes the oldest one the youngest.
    assert read(tier, 0) == content(0)
    tier.write(FILE_ID, 5, content(5))
    kept = [offset for offset in range(6) if read(tier, offset) == content(offset)]
    assert kept == [0, 2, 3, 4, 5]
    for offset in range(6, 40):
        tier.write(FILE_ID, offset, content(offset))
        assert num_bytes(tmp_path) <= 5 * SIZE_BYTES
        assert read(tier, offset) == content(offset)


def test_a_hit_is_noted_once_a_minute(make_tier, tmp_path: Path) -> None:
    tier = make_tier()
    tier.write(FILE_ID, 0, content(0))
    [path] = payload_files(tmp_path)
    for seconds, is_noted in ((30, False), (90, True)):
        age(tmp_path, 0, seconds)
        before = path.stat().st_mtime
        read(tier, 0)
        assert (path.stat().st_mtime > before + 10) == is_noted


def test_nothing_is_listed_while_there_is_room(make_tier, monkeypatch) -> None:
    tier = make_tier()
    tier.write(FILE_ID, 0, content(0))
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail("lists the files"))
    for offset in range(1, 10):
        make_tier().write(FILE_ID, offset, content(offset))
    assert read(tier, 9) == content(9)


@pytest.mark.parametrize("lost", ["missing", "garbled"])
def test_a_lost_count_is_counted_again(make_tier, tmp_path: Path, lost: str) -> None:
    for offset in range(4):
        make_tier().write(FILE_ID, offset, content(offset))
    count = next(tmp_path.rglob("used_bytes"))
    assert count.read_text() == "4000"
    count.unlink() if lost == "missing" else count.write_text("4x")
    make_tier().write(FILE_ID, 4, content(4))
    assert count.read_text() == "5000"


def test_an_eviction_corrects_the_count_and_takes_what_killed_writers_left(make_tier, tmp_path: Path) -> None:
    tier = make_tier(5 * SIZE_BYTES)
    for offset in range(3):
        tier.write(FILE_ID, offset, content(offset))
    left = payload_files(tmp_path)[0].with_name(f"{FILE_ID}-9.partial-{uuid.uuid4().hex}")
    left.write_bytes(content(9))
    os.utime(left, (0, 0))
    payload_files(tmp_path)[1].unlink()
    next(tmp_path.rglob("used_bytes")).write_text("5000")
    tier.write(FILE_ID, 3, content(3))
    # Three files were there in truth, so none had to go; the next eviction begins with the leftover.
    assert next(tmp_path.rglob("used_bytes")).read_text() == "4000"
    tier.write(FILE_ID, 4, content(4))
    tier.write(FILE_ID, 5, content(5))
    assert not left.exists()
    assert num_bytes(tmp_path) <= 5 * SIZE_BYTES


def test_files_of_other_people_are_never_touched(make_tier, tmp_path: Path) -> None:
    tier = make_tier(2 * SIZE_BYTES)
    others = [
        tmp_path / f"{FILE_ID}-1",
        Path(tier.folder, "thesis.tex"),
        Path(tier.folder, "ab", "only copy"),
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        os.utime(path, (0, 0))
    for offset in range(10):
        tier.write(FILE_ID, offset, content(offset))
    assert all(path.read_text() == "mine" for path in others)
    assert read(tier, 9) == content(9)


def test_what_is_larger_than_the_limit_is_not_kept(make_tier, tmp_path: Path) -> None:
    tier = make_tier(5 * SIZE_BYTES)
    tier.write(FILE_ID, 1, content(1))
    tier.write(FILE_ID, 2, content(2, 6 * SIZE_BYTES))
    assert [path.name for path in payload_files(tmp_path)] == [f"{FILE_ID}-1"]


def test_a_file_cut_short_is_dropped(make_tier, tmp_path: Path) -> None:
    tier = make_tier()
    tier.write(FILE_ID, 0, content(0))
    [path] = payload_files(tmp_path)
    path.write_bytes(content(0)[:-1])
    assert read(tier, 0) is None
    assert payload_files(tmp_path) == []
    tier.write(FILE_ID, 0, content(0))
    assert read(tier, 0) == content(0)


def test_dropping_gives_the_room_back(make_tier, tmp_path: Path) -> None:
    tier = make_tier()
    for offset in range(2):
        tier.write(FILE_ID, offset, content(offset))
    tier.drop(FILE_ID, 0)
    tier.drop(FILE_ID, 0)
    assert next(tmp_path.rglob("used_bytes")).read_text() == "1000"
    assert read(tier, 0) is None


def test_room_is_made_for_what_is_large_beside_the_limit(make_tier) -> None:
    tier = make_tier(1500)
    for offset in range(4):
        tier.write(FILE_ID, offset, content(offset))
        assert read(tier, offset) == content(offset)
    tier.write(FILE_ID, 9, content(9, 1500))
    assert read(tier, 9, 1500) == content(9, 1500)


def test_one_process_counts_at_a_time(make_tier, monkeypatch) -> None:
    tier = make_tier()
    tier.write(FILE_ID, 0, content(0))
    count, waits, flock = Path(tier.folder, "used_bytes"), threading.Event(), fcntl.flock
    writer = threading.Thread(target=lambda: tier.write(FILE_ID, 1, content(1)))
    with open(count, "rb") as other:
        flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", lambda *lock: (waits.set(), flock(*lock)))
        writer.start()
        assert waits.wait(20)
        assert count.read_text() == "1000"
    writer.join(20)
    assert count.read_text() == "2000"


def test_a_folder_cleared_by_somebody_is_filled_again(make_tier, tmp_path: Path) -> None:
    tier = make_tier()
    tier.write(FILE_ID, 0, content(0))
    shutil.rmtree(tier.folder)
    assert read(tier, 0) is None
    tier.drop(FILE_ID, 0)
    tier.write(FILE_ID, 0, content(0))
    assert read(tier, 0) == content(0)


def test_a_full_disk_is_said_once_and_tried_again_later(make_tier, tmp_path: Path, monkeypatch, caplog) -> None:
    tier, clock = make_tier(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    replace, attempts = os.replace, []

    def full(source, target):
        attempts.append(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        for offset in range(3):
            tier.write(FILE_ID, offset, content(offset))
        clock[0] += 61
        tier.write(FILE_ID, 3, content(3))
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert len(attempts) == 2
    assert payload_files(tmp_path) == []
    assert next(tmp_path.rglob("used_bytes")).read_text() == "0"
    monkeypatch.setattr(os, "replace", replace)
    clock[0] += 61
    tier.write(FILE_ID, 3, content(3))
    assert read(tier, 3) == content(3)


def test_a_folder_that_cannot_be_made_is_refused_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*cache\.disk_tier"):
        DiskTier(str(tmp_path / "file"), 1)


def test_while_another_process_makes_room_nothing_waits_for_it(make_tier, tmp_path: Path) -> None:
    tier = make_tier(2 * SIZE_BYTES)
    for offset in range(2):
        tier.write(FILE_ID, offset, content(offset))
    with open(Path(tier.folder, "eviction.lock"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        tier.write(FILE_ID, 2, content(2))
        assert read(tier, 2) is None
        assert read(tier, 1) == content(1)
    tier.write(FILE_ID, 2, content(2))
    assert read(tier, 2) == content(2)


def test_many_at_once_keep_the_limit_and_never_read_a_wrong_byte(tmp_path: Path) -> None:
    limit_bytes, wrong, num_hits = 8 * SIZE_BYTES, [], []

    def work(seed: int) -> None:
        # Each with a handle of its own, as processes have.
        tier, numbers = DiskTier(str(tmp_path), limit_bytes), random.Random(seed)
        for _ in range(150):
            offset = numbers.randrange(20)
            found = read(tier, offset)
            num_hits.append(found is not None)
            if found is None:
                tier.write(FILE_ID, offset, content(offset))
            elif found != content(offset):
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert any(num_hits)
    # Written without taking turns, so three others may be in the middle of a file when one counts.
    assert num_bytes(tmp_path) <= limit_bytes + 3 * SIZE_BYTES
    assert not [path for path in payload_files(tmp_path) if "partial" in path.name]


@pytest.fixture
def tiered(make_identity, make_image, root: str, tmp_path: Path):
    """Three images in a cache, a reader with a tier, and the ranges it asks the origin for."""

    images = [make_image(str(i), shape=i) for i in range(3)]
    uri = create_cache(root, make_identity(), "float16")
    write_feature_file(uri, [encode_row(image, get_codec("float16")) for image in images])
    commit(uri)
    return FeatureCache.open(uri, disk_tier=DiskTier(str(tmp_path / "tier"), 1 << 20)), images


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The starts of the ranges that are read from the origin."""
    starts, read_range_into = [], storage.read_range_into

    def counted(uri, start, buffer):
        starts.append(start)
        read_range_into(uri, start, buffer)

    monkeypatch.setattr(storage, "read_range_into", counted)
    return starts


def same(got, image) -> bool:
    pairs = zip(got.features, image.features, strict=True)
    return got.image_key == image.image_key and all(torch.equal(part, whole.half()) for part, whole in pairs)


def test_a_cache_reads_each_image_once_from_its_origin(tiered, asked) -> None:
    cache, images = tiered
    for _ in range(3):
        assert all(same(cache.get(image.image_key), image) for image in images)
    reopened = pickle.loads(pickle.dumps(cache))
    assert all(same(got, image) for got, image in zip(reopened.prefetch(cache.keys()), by_key(images), strict=True))
    assert len(asked) == 3


def by_key(images):
    return sorted(images, key=lambda image: image.image_key)


def test_a_damaged_copy_is_replaced_from_the_origin(tiered, asked, tmp_path: Path) -> None:
    cache, images = tiered
    cache.get(images[1].image_key)
    [copy] = [path for path in (tmp_path / "tier").rglob("*-*") if path.is_file() and path.parent.name != "tier"]
    whole = copy.read_bytes()
    copy.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    assert same(cache.get(images[1].image_key), images[1])
    assert copy.read_bytes() == whole
    assert same(cache.get(images[1].image_key), images[1])
    assert len(asked) == 2


def test_damage_at_the_origin_is_not_kept(make_identity, make_image, tmp_path: Path) -> None:
    uri = create_cache(str(tmp_path / "cache"), make_identity(), "float16")
    record = write_feature_file(uri, [encode_row(make_image("a"), get_codec("float16"))])
    commit(uri)
    path, offset = Path(uri, record.file), record.rows["features_offset"][0].as_py()
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    cache = FeatureCache.open(uri, disk_tier=DiskTier(str(tmp_path / "tier"), 1 << 20))
    for _ in range(2):
        with pytest.raises(CorruptPayloadError):
            cache.get(make_image("a").image_key)
    path.write_bytes(whole)
    assert same(cache.get(make_image("a").image_key), make_image("a"))
