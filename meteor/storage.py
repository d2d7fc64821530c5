"""Files and objects by URI, a local path or s3://bucket/key: the only door to boto3 and to pyarrow's file systems.

Every write appears whole or not at all. The usual AWS_* variables and profiles configure S3, AWS_ENDPOINT_URL and
AWS_REGION included. A URI names one file; folders exist only as prefixes of names, on local disk too.
"""

import functools
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pyarrow import fs

from meteor.errors import AlreadyExistsError, NotFoundError, StorageError
from meteor.optional import import_optional

_PARTIAL_PREFIX = ".partial-"
_COPY_CHUNK_BYTES = 8 << 20
_NUM_CREATE_ATTEMPTS = 5
_NUM_CONNECTIONS = 32


@dataclass(frozen=True)
class ObjectInfo:
    """One file or object; ``etag`` changes when its content does (the modification time in ns on local disk)."""

    uri: str
    size_bytes: int
    etag: str


def absolute(uri: str) -> str:
    """The URI that means the same from any working directory: local paths expanded, s3 without a trailing slash."""
    return uri.rstrip("/") if _is_s3(uri) else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it; a part may hold slashes itself."""
    below = [part.strip("/") for part in parts]
    return "/".join([uri.rstrip("/"), *below]) if _is_s3(uri) else os.path.join(uri, *below)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises NotFoundError if there is none."""
    with _at(uri) as place:
        return place.read()


def read_range(uri: str, start: int, size_bytes: int) -> bytes:
    """``size_bytes`` bytes from ``start`` on; see `read_range_into`."""
    buffer = bytearray(size_bytes)
    read_range_into(uri, start, buffer)
    return bytes(buffer)


def read_range_into(uri: str, start: int, buffer: bytearray | memoryview) -> None:
    """Fill ``buffer`` with the file's bytes from ``start`` on, without a copy in between.

    Raises:
        NotFoundError: there is no such file.
        StorageError: the file ends inside the range.
    """
    if not len(buffer):
        return
    with _at(uri) as place:
        num_read = place.read_into(start, memoryview(buffer))
    if num_read != len(buffer):
        raise StorageError(
            f"{uri} ends {len(buffer) - num_read} bytes before the end of the range [{start}, {start + len(buffer)}): "
            "the file was cut short, or the range belongs to another file"
        )


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file, replacing what was there; a reader sees the old content or the new, never half."""
    with _at(uri) as place:
        place.write(data)


def create_bytes(uri: str, data: bytes) -> None:
    """Write the file only if there is none: of several writers exactly one succeeds.

    On S3 a put whose answer was lost is sent again and can lose against itself: who gets AlreadyExistsError must look
    at what is there before concluding that somebody else wrote it.

    Raises:
        AlreadyExistsError: there was one already.
    """
    with _at(uri) as place:
        place.create(data)


def read_json(uri: str) -> Any:
    """The file's JSON value. Raises StorageError if it holds none."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} does not hold valid JSON ({error}); restore or delete it") from error


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as JSON (see `json_bytes`)."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as readable JSON without NaN, keys sorted: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def upload_file(local_path: str, uri: str) -> None:
    """Copy a local file to ``uri``, replacing what was there."""
    if not os.path.isfile(local_path):
        raise NotFoundError(f"{local_path} is not there to be copied to {uri}")
    with _at(uri) as place:
        place.upload(local_path)


def download_file(uri: str, local_path: str) -> None:
    """Copy ``uri`` to a local path, which appears when it is complete."""
    target = absolute(local_path)
    with _at(uri) as place, _partial_file(target) as partial:
        place.download(partial)
        os.replace(partial, target)


def stat(uri: str) -> ObjectInfo:
    """Size and etag. Raises NotFoundError if there is no such file (a folder is none)."""
    with _at(uri) as place:
        return place.stat()


def exists(uri: str) -> bool:
    """Whether there is a file of exactly this name; False for a folder."""
    try:
        stat(uri)
    except NotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    """Delete the file; absent is fine."""
    with _at(uri) as place:
        place.delete()


def list_objects(prefix_uri: str) -> list[ObjectInfo]:
    """All files below the folder, recursively, sorted by URI; none when it is absent. Unfinished writes never show."""
    with _at(prefix_uri) as place:
        return sorted(place.list(), key=lambda info: info.uri)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for the URI, and the path inside it."""
    with _at(uri) as place:
        return place.filesystem()


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def read_into(self, start: int, buffer: memoryview) -> int:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            return _fill(buffer, file)

    def write(self, data: bytes) -> None:
        self._publish(io.BytesIO(data), os.replace)

    def create(self, data: bytes) -> None:
        self._publish(io.BytesIO(data), os.link)

    def upload(self, source: str) -> None:
        with open(source, "rb") as file:
            self._publish(file, os.replace)

    def _publish(self, content: BinaryIO, move: Callable[[str, str], None]) -> None:
        with _partial_file(self.path) as partial:
            with open(partial, "xb") as file:
                shutil.copyfileobj(content, file, _COPY_CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
            move(partial, self.path)

    def download(self, target: str) -> None:
        shutil.copyfile(self.path, target)

    def stat(self) -> ObjectInfo:
        status = os.stat(self.path)
        if not os.path.isfile(self.path):
            raise IsADirectoryError(self.path)
        return ObjectInfo(self.path, status.st_size, str(status.st_mtime_ns))

    def delete(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def list(self) -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                if not name.startswith(_PARTIAL_PREFIX):
                    # Another process may delete a file between the walk and the look at it.
                    with suppress(FileNotFoundError):
                        yield _LocalFile(os.path.join(folder, name)).stat()

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), self.path


class _S3Object:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, _, self.key = uri.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise StorageError(f"{uri!r} names no bucket; write s3://bucket/key")
        self.client = _s3_client()

    def address(self) -> dict[str, str]:
        if not self.key:
            raise StorageError(f"{self.uri!r} names a bucket and nothing in it; write s3://bucket/key")
        return {"Bucket": self.bucket, "Key": self.key}

    def read(self) -> bytes:
        return self.client.get_object(**self.address())["Body"].read()

    def read_into(self, start: int, buffer: memoryview) -> int:
        requested = f"bytes={start}-{start + len(buffer) - 1}"
        return _fill(buffer, self.client.get_object(**self.address(), Range=requested)["Body"])

    def write(self, data: bytes) -> None:
        self.client.put_object(**self.address(), Body=data)

    def create(self, data: bytes) -> None:
        errors = _boto3_module("botocore.exceptions")
        for attempt in range(_NUM_CREATE_ATTEMPTS):
            try:
                self.client.put_object(**self.address(), Body=data, IfNoneMatch="*")
                return
            except errors.ClientError as error:
                # 409: another conditional put is under way; sent again, this one succeeds or gets 412.
                if _code(error) not in {"ConditionalRequestConflict", "409"} or attempt + 1 == _NUM_CREATE_ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)

    def upload(self, source: str) -> None:
        self.client.upload_file(Filename=source, **self.address())

    def download(self, target: str) -> None:
        self.client.download_file(Filename=target, **self.address())

    def stat(self) -> ObjectInfo:
        head = self.client.head_object(**self.address())
        return ObjectInfo(self.uri, head["ContentLength"], head["ETag"].strip('"'))

    def delete(self) -> None:
        self.client.delete_object(**self.address())

    def list(self) -> Iterator[ObjectInfo]:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self.key}/" if self.key else ""):
            for found in page.get("Contents", []):
                # Consoles and Arrow mark folders by empty objects that end in a slash.
                if not found["Key"].endswith("/"):
                    yield ObjectInfo(f"s3://{self.bucket}/{found['Key']}", found["Size"], found["ETag"].strip('"'))

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        options = {"region": self.client.meta.region_name}
        if not _is_aws(self.client):
            # Arrow's client has no option for this, and many stores other than AWS refuse its default checksums.
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
            os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
            endpoint = urlsplit(self.client.meta.endpoint_url)
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        return fs.S3FileSystem(**options), f"{self.bucket}/{self.key}".rstrip("/")


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


@contextmanager
def _at(uri: str) -> Iterator[_LocalFile | _S3Object]:
    if "://" in uri and not _is_s3(uri):
        raise StorageError(f"{uri}: only local paths and s3:// are supported")
    place = _S3Object(absolute(uri)) if _is_s3(uri) else _LocalFile(absolute(uri))
    with _errors_of_s3(uri) if _is_s3(uri) else _errors_of_disk(uri):
        yield place


@contextmanager
def _errors_of_disk(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{uri} does not exist") from error
    except IsADirectoryError as error:
        raise NotFoundError(f"{uri} is a folder, not a file") from error
    except FileExistsError as error:
        raise AlreadyExistsError(f"{uri} exists already") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error}") from error


@contextmanager
def _errors_of_s3(uri: str) -> Iterator[None]:
    errors = _boto3_module("botocore.exceptions")
    try:
        with _errors_of_disk(uri):
            yield
    except errors.ClientError as error:
        if _code(error) in {"NoSuchKey", "NoSuchBucket", "NotFound", "404"}:
            raise NotFoundError(f"{uri} does not exist ({_code(error)})") from error
        if _code(error) in {"PreconditionFailed", "412"}:
            raise AlreadyExistsError(f"{uri} exists already") from error
        raise StorageError(f"{uri}: {error}") from error
    except (errors.BotoCoreError, _boto3_module("boto3.exceptions").Boto3Error) as error:
        raise StorageError(f"{uri}: {error}") from error


@contextmanager
def _partial_file(path: str) -> Iterator[str]:
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path} cannot be written: a file stands where its folder {folder} should be") from error
    partial = os.path.join(folder, f"{_PARTIAL_PREFIX}{uuid.uuid4().hex}")
    try:
        yield partial
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _fill(buffer: memoryview, file: Any) -> int:
    num_read = 0
    while num_read < len(buffer) and (count := file.readinto(buffer[num_read:])):
        num_read += count
    return num_read


def _boto3_module(name: str) -> ModuleType:
    return import_optional(name, needed_for="Reading and writing s3:// URIs", install="pip install 'boto3>=1.40'")


def _code(client_error: Any) -> str:
    return str(client_error.response.get("Error", {}).get("Code", ""))


def _is_aws(client: Any) -> bool:
    return ".amazonaws.com" in (urlsplit(client.meta.endpoint_url).hostname or "")


def _s3_client() -> Any:
    # A client does not survive a fork, and takes its configuration from the environment when it is made.
    return _new_s3_client(os.getpid(), tuple(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=8)
def _new_s3_client(process_id: int, environment: tuple[tuple[str, str], ...]) -> Any:
    # A session of its own: boto3's shared one must not be used from several threads.
    session = _boto3_module("boto3").session.Session()
    config = _boto3_module("botocore.config").Config
    options: dict[str, Any] = {"max_pool_connections": _NUM_CONNECTIONS}
    region = os.environ.get("AWS_REGION") or session.region_name
    client = session.client("s3", region_name=region, config=config(**options))
    if _is_aws(client):
        return client
    # The default checksums of newer clients are refused by many stores other than AWS.
    options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return session.client("s3", region_name=region, config=config(**options))
