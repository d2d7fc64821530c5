"""Storage: local disk, a mock of S3 and a real S3 server behave the same."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meteor import storage
from meteor.errors import AlreadyExistsError, InaccessibleError, NotFoundError, StorageError
from meteor.storage import s3
from meteor.storage.client import s3_client


def test_what_is_written_is_read_back_whole_and_in_ranges(root: str) -> None:
    uri = storage.join(root, "a/b", "data.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 10, 0) == b""
    buffer = bytearray(2)
    storage.read_range_into(uri, 8, buffer)
    assert buffer == b"89"
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


def test_a_range_beyond_the_end_is_refused_with_the_uri(root: str) -> None:
    uri = storage.join(root, "data.bin")
    storage.write_bytes(uri, b"0123")
    with pytest.raises(StorageError, match=r"data\.bin"):
        storage.read_range(uri, 2, 4)
    with pytest.raises(StorageError, match=r"data\.bin"):
        storage.read_range(uri, 8, 1)


def test_a_file_larger_than_its_reader_expects_is_refused_by_the_size_it_announces(root: str) -> None:
    uri = storage.join(root, "data.bin")
    storage.write_bytes(uri, b"0123")
    assert storage.read_bytes(uri, max_bytes=4) == b"0123"
    with pytest.raises(InaccessibleError, match=r"data\.bin has 4 bytes, and at most 3 are read"):
        storage.read_bytes(uri, max_bytes=3)


@pytest.mark.parametrize(("start", "size_bytes"), [(0, 1 << 60), (1 << 60, 1 << 60), (-1, 2), (0, -5)])
def test_a_range_that_damaged_data_name_is_refused_before_memory_is_taken(
    root: str, start: int, size_bytes: int
) -> None:
    uri = storage.join(root, "data.bin")
    storage.write_bytes(uri, b"0123")
    with pytest.raises(StorageError, match=r"data\.bin ends .* before the end of the range"):
        storage.read_range(uri, start, size_bytes)


@pytest.mark.parametrize("read", [storage.read_bytes, storage.stat, storage.read_json])
def test_reading_what_is_absent_names_the_uri(root: str, read) -> None:
    uri = storage.join(root, "absent.json")
    with pytest.raises(NotFoundError, match=r"absent\.json"):
        read(uri)
    with pytest.raises(NotFoundError, match=r"absent\.json"):
        storage.read_range(uri, 0, 1)
    assert not storage.exists(uri)
    storage.delete(uri)


def test_create_writes_once_and_leaves_the_first_content(root: str) -> None:
    uri = storage.join(root, "manifests/v00000001.json")
    storage.create_bytes(uri, b"first")
    with pytest.raises(AlreadyExistsError, match=r"v00000001\.json"):
        storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_many_creators_exactly_one_wins(root: str, race_to_create) -> None:
    race_to_create(storage.join(root, "one-winner"))


def test_a_listing_is_recursive_sorted_and_confined_to_the_folder(root: str) -> None:
    for name in ["b/2", "b/10", "a", "b/c/1", "bb/1"]:
        storage.write_bytes(storage.join(root, name), name.encode())
    listed = storage.list_objects(storage.join(root, "b"))
    assert [info.uri for info in listed] == [storage.join(root, name) for name in ["b/10", "b/2", "b/c/1"]]
    assert [info.size_bytes for info in listed] == [4, 3, 5]
    assert listed[0] == storage.stat(listed[0].uri)
    assert storage.list_objects(root + "/")[0].uri == storage.join(root, "a")
    assert storage.list_objects(storage.join(root, "absent")) == []


def test_the_etag_changes_with_the_content(root: str) -> None:
    uri = storage.join(root, "image.png")
    storage.write_bytes(uri, b"old!")
    before = storage.stat(uri)
    assert storage.stat(uri) == before
    storage.write_bytes(uri, b"new!")
    if not uri.startswith("s3://"):
        os.utime(uri, ns=(1, 1))
    assert storage.stat(uri).size_bytes == before.size_bytes
    assert storage.stat(uri).etag != before.etag


def test_a_folder_is_not_a_file(root: str) -> None:
    storage.write_bytes(storage.join(root, "folder/file"), b"x")
    folder = storage.join(root, "folder")
    assert not storage.exists(folder)
    with pytest.raises(NotFoundError):
        storage.stat(folder)
    with pytest.raises(NotFoundError):
        storage.read_bytes(folder)
    assert not storage.exists(storage.join(root, "folder/file/below"))


def test_json_is_canonical_and_broken_json_names_the_file(root: str) -> None:
    uri = storage.join(root, "settings.json")
    storage.write_json(uri, {"b": [1, 2.5], "a": "Größe"})
    first = storage.read_bytes(uri)
    assert storage.read_json(uri) == {"a": "Größe", "b": [1, 2.5]}
    storage.write_json(uri, {"a": "Größe", "b": [1, 2.5]})
    assert storage.read_bytes(uri) == first
    for broken in (b'{"a": ', b"[" * 100_000):
        storage.write_bytes(uri, broken)
        with pytest.raises(StorageError, match=r"settings\.json"):
            storage.read_json(uri)


def test_files_are_uploaded_and_downloaded(root: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "deep" / "target.bin"
    source.write_bytes(bytes(range(256)) * 50)
    uri = storage.join(root, "model/weights.bin")
    storage.upload_file(str(source), uri)
    storage.download_file(uri, str(target))
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(NotFoundError, match=r"no\.bin"):
        storage.download_file(storage.join(root, "no.bin"), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target.bin"]
    with pytest.raises(NotFoundError, match=r"no\.bin"):
        storage.upload_file(str(tmp_path / "no.bin"), uri)


def test_deleted_files_are_gone(root: str) -> None:
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"x")
    storage.delete(uri)
    assert not storage.exists(uri)


def test_files_are_dated_by_the_clock_that_now_reads(root: str) -> None:
    before_s = storage.now_s(root)
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"x")
    # S3's answers carry whole seconds.
    assert before_s - 1 <= storage.stat(uri).modified_s <= storage.now_s(root) + 1
    assert storage.list_objects(root)[0].modified_s == pytest.approx(storage.stat(uri).modified_s, abs=1)


def test_what_broken_writes_left_is_deleted_when_it_is_old(root: str) -> None:
    storage.write_bytes(storage.join(root, "data/file"), b"x")
    partial = storage.join(root, "data/.partial-123")
    storage.write_bytes(partial, b"half")
    left = [partial]
    assert [info.uri for info in storage.list_objects(root)] == [storage.join(root, "data/file")]
    assert storage.delete_leftovers(root, 60, dry_run=False) == []
    if root.startswith("s3://"):
        # After that, as the mock dates every upload to 2010.
        key = f"{root.removeprefix('s3://bucket/')}/data/large"
        upload = s3_client().create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]
        left.append(f"s3://bucket/{key}?uploadId={upload}")
    assert storage.delete_leftovers(root, -60, dry_run=True) == sorted(left)
    assert storage.delete_leftovers(storage.join(root, "dat"), -60, dry_run=False) == []
    assert storage.delete_leftovers(root, -60, dry_run=False) == sorted(left)
    assert storage.delete_leftovers(root, -60, dry_run=True) == []
    assert not storage.exists(partial)
    assert storage.exists(storage.join(root, "data/file"))


def test_large_files_are_written_in_parts(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 8 << 20)
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    data = bytes(range(256)) * 50_000
    uri = storage.join(root, "large")
    storage.write_bytes(uri, data)
    # The etag of an object of several parts counts them.
    assert root.startswith("s3://") == storage.stat(uri).etag.endswith("-3")
    assert storage.read_bytes(uri) == data
    (tmp_path / "source").write_bytes(data)
    storage.upload_file(str(tmp_path / "source"), uri + "2")
    storage.download_file(uri + "2", str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == data


def test_many_threads_read_at_once(root: str) -> None:
    data = os.urandom(1 << 20)
    uri = storage.join(root, "file")
    storage.write_bytes(uri, data)

    def read(number: int) -> bool:
        start = number * 1009
        return storage.read_range(uri, start, 200_000) == data[start : start + 200_000]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(read, range(64)))
