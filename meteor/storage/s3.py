"""Objects of an S3 store: a bounded number of requests, and reads that continue where a connection broke."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import pyarrow as pa

from meteor.errors import InaccessibleError, StorageError
from meteor.storage import s3_create
from meteor.storage.client import boto3_module, s3_client
from meteor.storage.place import ObjectInfo, check_size, is_partial

# Writes from this size on are sent in parts; a part that fails is sent again alone.
_MULTIPART_BYTES = 64 << 20
_PART_BYTES = 16 << 20
# The client holds at most ten parts in memory: 160 MB.
_NUM_PART_THREADS = 4
_NUM_UPLOAD_ATTEMPTS = 3
# Attempts per read, with pauses of 0.2, 0.4, 0.8 and 1.6 s between them.
_NUM_READ_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2
# Bytes read from a stream at a time; larger windows measured no faster.
_WINDOW_BYTES = 1 << 20


class S3Object:
    """The object at ``s3://bucket/key`` (`Place`)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, _, self.key = uri.removeprefix("s3://").partition("/")
        if not self.bucket:
            raise StorageError(f"{uri!r} names no bucket; write s3://bucket/key")
        self.client = s3_client()

    def address(self) -> dict[str, str]:
        if not self.key:
            raise StorageError(f"{self.uri!r} names a bucket without a key; write s3://bucket/key")
        return {"Bucket": self.bucket, "Key": self.key}

    def read(self, max_bytes: int | None) -> bytes:
        response = self.client.get_object(**self.address())
        try:
            check_size(self.uri, response["ContentLength"], max_bytes)
        except InaccessibleError:
            response["Body"].close()
            raise
        # BytesIO keeps the bytes object that it is given, so filling it in place returns the content without a copy.
        content = io.BytesIO(bytes(response["ContentLength"]))
        with content.getbuffer() as buffer:
            self._fill(buffer, 0, response)
        return content.getvalue()

    def read_into(self, start: int, buffer: memoryview) -> int:
        response = self._get_range(start, len(buffer))
        num_bytes: int = response["ContentLength"]
        self._fill(buffer[:num_bytes], start, response)
        return num_bytes

    def _get_range(self, start: int, num_bytes: int, **conditions: str) -> Any:
        response = self.client.get_object(
            **self.address(), Range=f"bytes={start}-{start + num_bytes - 1}", **conditions
        )
        if response["ContentLength"] > num_bytes:
            response["Body"].close()
            raise StorageError(f"{self.uri}: the store ignores byte ranges; use a store that supports them (RFC 9110)")
        return response

    def _fill(self, buffer: memoryview, start: int, response: Any) -> None:
        """Read the response's body into the buffer; if it breaks off, request the remaining bytes."""
        broken = (boto3_module("botocore.exceptions").BotoCoreError, OSError)
        position, pause_s = 0, _FIRST_PAUSE_S
        for attempt in range(1, _NUM_READ_ATTEMPTS + 1):
            body = response["Body"]
            try:
                while position < len(buffer):
                    # If the body ends too early, this raises IncompleteReadError.
                    position += body.readinto(buffer[position : position + _WINDOW_BYTES])
            except broken as error:
                if attempt == _NUM_READ_ATTEMPTS:
                    raise StorageError(
                        f"{self.uri}: reading broke off {attempt} times, the last time {start + position} bytes into the "
                        f"object with {len(buffer) - position} to go ({error}). The store or the network is "
                        "overloaded or down; finished work is kept, so start again when the store answers"
                    ) from error
            else:
                # Reading to the end makes botocore compare the checksum, if the store sent one.
                body.readinto(bytearray(1))
                return
            finally:
                body.close()
            time.sleep(pause_s)
            pause_s *= 2
            # If-Match keeps the bytes of two versions of the object from being mixed.
            response = self._get_range(start + position, len(buffer) - position, IfMatch=response["ETag"])

    def write(self, data: bytes | memoryview) -> None:
        # boto3 takes no memoryview; Arrow's reader presents it as a file without a copy.
        if len(data) < _MULTIPART_BYTES:
            self.client.put_object(**self.address(), Body=pa.BufferReader(data))
        else:
            self._send(lambda: self.client.upload_fileobj(pa.BufferReader(data), **self.address(), Config=_transfer()))

    def create(self, data: bytes) -> None:
        s3_create.create(self.client, self.address(), data)

    def upload(self, source: str) -> None:
        self._send(lambda: self.client.upload_file(Filename=source, **self.address(), Config=_transfer()))

    def _send(self, send: Callable[[], None]) -> None:
        failures = (boto3_module("botocore.exceptions").ClientError, boto3_module("boto3.exceptions").Boto3Error)
        for attempt in range(1, _NUM_UPLOAD_ATTEMPTS + 1):
            try:
                send()
                return
            except failures as error:
                # If the answer to the request that completes an upload is lost, the repeated request finds no upload.
                # This looks like an upload that never existed, so the whole file is sent again.
                if "NoSuchUpload" not in str(error) or attempt == _NUM_UPLOAD_ATTEMPTS:
                    raise

    def download(self, target: str) -> None:
        # boto3 itself continues parts that break off, up to five times each, with If-Match.
        self.client.download_file(Filename=target, **self.address())

    def stat(self) -> ObjectInfo:
        head = self.client.head_object(**self.address())
        return _info(self.uri, head["ContentLength"], head)

    def delete(self) -> None:
        self.client.delete_object(**self.address())

    def list(self) -> Iterator[ObjectInfo]:
        return (info for info in self._walk() if not is_partial(info.uri))

    def delete_empty_folders(self) -> None:
        pass

    def leftovers(self, older_than_s: float, dry_run: bool) -> Iterator[str]:
        oldest_kept_s = self.now_s() - older_than_s
        for info in self._walk():
            if is_partial(info.uri) and info.modified_s < oldest_kept_s:
                if not dry_run:
                    S3Object(info.uri).delete()
                yield info.uri
        pages = self.client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix()):
            for upload in page.get("Uploads", []):
                if upload["Initiated"].timestamp() < oldest_kept_s:
                    if not dry_run:
                        self._abort(upload["Key"], upload["UploadId"])
                    yield f"s3://{self.bucket}/{upload['Key']}?uploadId={upload['UploadId']}"

    def _abort(self, key: str, upload_id: str) -> None:
        # The upload may have been completed or aborted in the meantime.
        with suppress(self.client.exceptions.NoSuchUpload):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)

    def _walk(self) -> Iterator[ObjectInfo]:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix()):
            for found in page.get("Contents", []):
                # Web consoles and Arrow represent folders by empty objects whose keys end in a slash.
                if not found["Key"].endswith("/"):
                    yield _info(f"s3://{self.bucket}/{found['Key']}", found["Size"], found)

    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def now_s(self) -> float:
        # The listing has this prefix because some credentials have rights for a part of the bucket only.
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix(), MaxKeys=1)
        answer = found["ResponseMetadata"]["HTTPHeaders"]
        return parsedate_to_datetime(answer["date"]).timestamp()


def _info(uri: str, size_bytes: int, answer: dict[str, Any]) -> ObjectInfo:
    etag = answer["ETag"].strip('"')
    return ObjectInfo(uri, size_bytes, etag, answer["LastModified"].timestamp(), etag)


def _transfer() -> Any:
    return boto3_module("boto3.s3.transfer").TransferConfig(
        multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_NUM_PART_THREADS
    )
