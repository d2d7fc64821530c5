"""Local disk: nothing half is seen after a failure, a kill, a full disk."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from meteor import storage
from meteor.errors import AlreadyExistsError, StorageError
from meteor.storage import exclusive, local


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_failure_between_writing_and_renaming_leaves_nothing(tmp_path: Path, monkeypatch, write) -> None:
    def fail(*paths: str) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match="disk on fire"):
        write(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["write_bytes", "create_bytes"])
def test_a_process_killed_between_writing_and_renaming_leaves_nothing_listed(tmp_path: Path, function: str) -> None:
    script = (
        "import os; from meteor import storage\n"
        "os.replace = os.link = lambda *paths: os._exit(9)\n"
        f"storage.{function}({str(tmp_path / 'file')!r}, b'half')"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    assert storage.list_objects(str(tmp_path)) == []
    assert not storage.exists(str(tmp_path / "file"))


def test_a_file_in_the_place_of_a_folder_is_not_mistaken_for_a_lost_race(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "cache"), b"x")
    with pytest.raises(StorageError, match="folder") as caught:
        storage.create_bytes(str(tmp_path / "cache/manifests/v1"), b"x")
    assert not isinstance(caught.value, AlreadyExistsError)


def test_uris_are_joined_and_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.join("s3://bucket/a/", "b/c", "/d") == "s3://bucket/a/b/c/d"
    assert storage.join("/a/", "b", "c/d") == "/a/b/c/d"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.absolute("~/data") == "/home/someone/data"


def test_storage_imports_and_works_on_disk_without_boto3(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['boto3'] = sys.modules['botocore'] = None\n"
        "from meteor import errors, storage\n"
        f"storage.write_bytes({str(tmp_path / 'file')!r}, b'x')\n"
        "try: storage.read_bytes('s3://bucket/key')\n"
        "except errors.MissingPackageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'boto3" in done.stdout


def test_a_full_disk_is_said_clearly_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file cannot be written: No space left.*free space"):
        storage.write_bytes(str(tmp_path / "file"), b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert storage.read_bytes(str(tmp_path / "file")) == b"before"


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_published_name_is_synced_after_the_move_and_so_are_new_folders(tmp_path: Path, monkeypatch, write) -> None:
    events: list[str] = []
    fsync, move = os.fsync, {"replace": os.replace, "link": os.link}

    def synced(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    for name, function in move.items():
        monkeypatch.setattr(os, name, lambda *paths, move=function: events.append("moved") or move(*paths))
    monkeypatch.setattr(os, "fsync", synced)
    write(str(tmp_path / "a/b/file"), b"x")
    assert events[:2] == [str(tmp_path), str(tmp_path / "a")]
    assert events[2].startswith(str(tmp_path / "a/b/.partial-"))
    assert events[3:] == ["moved", str(tmp_path / "a/b")]
    write(str(tmp_path / "a/b/other"), b"x")
    assert events[6:] == ["moved", str(tmp_path / "a/b")]


def no_links(*paths: str, **options: object) -> None:
    """What `link` does on exFAT."""
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_created_without_hard_links_too_and_only_once(tmp_path: Path, monkeypatch, number: int) -> None:
    def fail(*paths: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    uri = str(tmp_path / "manifests/v00000001.json")
    storage.create_bytes(uri, b"first")
    with pytest.raises(AlreadyExistsError, match=r"v00000001\.json"):
        storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == ["v00000001.json"]


def test_of_many_creators_without_hard_links_exactly_one_wins(tmp_path: Path, monkeypatch, race_to_create) -> None:
    monkeypatch.setattr(os, "link", no_links)
    race_to_create(str(tmp_path / "one-winner"))


@pytest.mark.parametrize("missing", ["flag", "function"])
def test_a_file_system_without_any_exclusive_move_is_named_with_the_remedy(tmp_path, monkeypatch, missing) -> None:
    def refuse(*arguments: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    library = SimpleNamespace(renameat2=refuse) if missing == "flag" else SimpleNamespace()
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(exclusive.ctypes, "CDLL", lambda *arguments, **options: library)
    with pytest.raises(StorageError, match=r"v1 cannot be created.*neither hard links.*nor a rename.*Use another"):
        storage.create_bytes(str(tmp_path / "v1"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_exclusive_rename_is_raised_with_the_file(tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(exclusive.ctypes, "CDLL", lambda *arguments, **options: SimpleNamespace(renameat2=full))
    with pytest.raises(StorageError, match=r"v1 cannot be written: No space left"):
        storage.create_bytes(str(tmp_path / "v1"), b"x")


@pytest.mark.parametrize("replace", ["write", "rename"])
def test_the_etag_changes_with_the_content_though_size_and_time_are_set_back(tmp_path: Path, replace: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"old!")
    os.utime(path, ns=(1, 1))
    before = storage.stat(str(path))
    wait_for_tick(tmp_path)
    if replace == "write":
        path.write_bytes(b"new!")
        os.utime(path, ns=(1, 1))
    else:
        (tmp_path / "other").write_bytes(b"new!")
        os.utime(tmp_path / "other", ns=(1, 1))
        (tmp_path / "other").rename(path)
    after = storage.stat(str(path))
    assert (after.size_bytes, after.modified_s, after.copied_etag) == (4, before.modified_s, before.copied_etag)
    assert after.etag != before.etag


def wait_for_tick(folder: Path) -> None:
    """Wait until the file system dates a new file later than one made before; kernels count some milliseconds at once."""
    start_s = storage.now_s(str(folder))
    while storage.now_s(str(folder)) == start_s:
        pass


def test_now_is_the_file_systems_time_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before_s = storage.now_s(str(tmp_path))
    storage.write_bytes(str(tmp_path / "file"), b"x")
    assert before_s <= storage.stat(str(tmp_path / "file")).modified_s <= storage.now_s(str(tmp_path / "absent/below"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_now_of_a_full_disk_is_still_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before_s = storage.now_s(str(tmp_path))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(os, "fsync", full)
    assert storage.now_s(str(tmp_path)) >= before_s


def test_now_of_a_folder_that_cannot_be_written_is_this_machines(tmp_path: Path, monkeypatch) -> None:
    def read_only(path: str, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(local, "open", read_only, raising=False)
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert storage.now_s(str(tmp_path)) == 5.0


def test_old_empty_folders_are_left_over_and_folders_in_use_are_not(tmp_path: Path) -> None:
    for name in ("steps/1/deep", "steps/2", "kept"):
        (tmp_path / name).mkdir(parents=True)
    storage.write_bytes(str(tmp_path / "steps/2/file"), b"x")
    assert storage.delete_leftovers(str(tmp_path), 60, dry_run=False) == []
    for name in ("steps/1/deep", "steps/1", "steps", "kept"):
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path, (1, 1))
    assert storage.delete_leftovers(str(tmp_path), 60, dry_run=True) == [
        f"{tmp_path}/kept/",
        f"{tmp_path}/steps/1/deep/",
    ]
    assert storage.delete_leftovers(str(tmp_path), 60, dry_run=False) == [
        f"{tmp_path}/kept/",
        f"{tmp_path}/steps/1/deep/",
    ]
    os.utime(tmp_path / "steps/1", (1, 1))
    assert storage.delete_leftovers(str(tmp_path), 60, dry_run=False) == [f"{tmp_path}/steps/1/"]
    assert storage.delete_leftovers(str(tmp_path / "steps"), 60, dry_run=False) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["steps", "2", "file"]


def test_a_folder_that_is_removed_just_before_a_write_is_made_again(tmp_path: Path, monkeypatch) -> None:
    make, removed = local._make_folder, []

    def make_and_remove(folder: str) -> None:
        make(folder)
        if not removed and folder == str(tmp_path / "pins"):
            removed.append(folder)
            os.rmdir(folder)

    monkeypatch.setattr(local, "_make_folder", make_and_remove)
    storage.write_bytes(str(tmp_path / "pins/run.json"), b"x")
    assert removed
    assert storage.read_bytes(str(tmp_path / "pins/run.json")) == b"x"


def test_a_folder_in_which_a_writer_just_started_stays(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pins").mkdir()
    os.utime(tmp_path / "pins", (1, 1))
    listdir = os.listdir

    def list_and_write(folder: str) -> list[str]:
        names = listdir(folder)
        (Path(folder) / ".partial-1").write_bytes(b"x")
        return names

    monkeypatch.setattr(os, "listdir", list_and_write)
    assert storage.delete_leftovers(str(tmp_path), 60, dry_run=False) == []
    assert (tmp_path / "pins/.partial-1").exists()


def test_a_listing_while_another_thread_creates_and_deletes_files_never_fails(tmp_path: Path) -> None:
    done = threading.Event()

    def create_and_delete() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / str(number)).touch()
            for number in range(20):
                (tmp_path / str(number)).unlink()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(create_and_delete)
        try:
            for _ in range(1000):
                assert all(info.uri.startswith(str(tmp_path)) for info in storage.list_objects(str(tmp_path)))
        finally:
            done.set()
