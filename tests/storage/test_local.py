"""Local disk: nothing half is seen after a failure, a kill, a full disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meteor import storage
from meteor.errors import AlreadyExistsError, StorageError


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
