"""Storage: local disk and S3 (a server on loopback) behave the same."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meteor import storage
from meteor.errors import AlreadyExistsError, NotFoundError, StorageError

BUCKET = "features"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh prefix of a bucket, with the environment that leads to it."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        # Set here so that what the code sets itself is taken back after the test.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "disk" else request.getfixturevalue("s3_root")


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


def test_of_many_creators_exactly_one_wins(root: str) -> None:
    uri = storage.join(root, "one-winner")
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        try:
            storage.create_bytes(uri, str(number).encode() * 1000)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == str(won.index(True)).encode() * 1000


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
    storage.write_bytes(uri, b'{"a": ')
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


def test_pyarrow_reads_and_writes_the_same_files(root: str) -> None:
    uri = storage.join(root, "table/part.bin")
    storage.write_bytes(uri, b"from us")
    filesystem, path = storage.filesystem(uri)
    assert filesystem.open_input_file(path).read() == b"from us"
    with filesystem.open_output_stream(path + "2") as stream:
        stream.write(b"from Arrow")
    assert storage.read_bytes(uri + "2") == b"from Arrow"


def test_empty_folder_markers_are_not_listed(s3_root: str) -> None:
    storage.write_bytes(storage.join(s3_root, "data/file"), b"x")
    filesystem, path = storage.filesystem(storage.join(s3_root, "data/empty"))
    filesystem.create_dir(path)
    assert [info.uri for info in storage.list_objects(s3_root)] == [storage.join(s3_root, "data/file")]


def test_a_missing_bucket_is_named_rather_than_taken_for_empty(s3_root: str) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        storage.list_objects("s3://no-such-bucket/cache")
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/cache/file", b"x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://bucket", "s3://bucket/", "gs://bucket/key"])
def test_uris_that_name_no_object_are_refused(s3_root: str, uri: str) -> None:
    with pytest.raises(StorageError, match="s3://"):
        storage.read_bytes(uri)


def test_an_unreachable_store_is_a_storage_error_with_the_uri(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="s3://features/file"):
        storage.read_bytes("s3://features/file")


def test_a_conditional_put_is_repeated_when_another_is_under_way(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    answers = ["ConditionalRequestConflict", "ConditionalRequestConflict", ""]

    class Client:
        def put_object(self, **request: object) -> None:
            assert request["IfNoneMatch"] == "*"
            if code := answers.pop(0):
                raise ClientError({"Error": {"Code": code, "Message": "try again"}}, "PutObject")

    monkeypatch.setattr(storage, "_s3_client", Client)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    storage.create_bytes("s3://features/file", b"x")
    assert answers == []
    answers[:] = ["ConditionalRequestConflict"] * 10
    with pytest.raises(StorageError, match="try again"):
        storage.create_bytes("s3://features/file", b"x")


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_failure_between_writing_and_renaming_leaves_nothing(tmp_path: Path, monkeypatch, write) -> None:
    def fail(*paths: str) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(storage.os, "replace", fail)
    monkeypatch.setattr(storage.os, "link", fail)
    with pytest.raises(StorageError, match="disk on fire"):
        write(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["write_bytes", "create_bytes"])
def test_a_process_killed_between_writing_and_renaming_leaves_nothing_listed(tmp_path: Path, function: str) -> None:
    script = (
        "import os; from meteor import storage\n"
        "storage.os.replace = storage.os.link = lambda *paths: os._exit(9)\n"
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
