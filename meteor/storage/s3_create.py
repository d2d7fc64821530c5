"""Conditional puts, which write an object only if it does not exist, and the refusal of stores that ignore them."""

import os
import threading
import time
from typing import Any

from meteor.errors import StorageError
from meteor.storage.place import partial_name
from meteor.storage.s3_errors import EXISTS, code_of

_NUM_CREATE_ATTEMPTS = 5
_CONFLICT = {"ConditionalRequestConflict", "409"}
_UNKNOWN = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest"}

_PROBING = threading.Lock()
# Stores that obey conditional puts, by process, endpoint and bucket.
_OBEDIENT: set[tuple[int, str, str]] = set()


def create(client: Any, address: dict[str, str], data: bytes) -> None:
    """Put ``data`` if no object exists at the address.

    Raises:
        StorageError: the store does not obey conditional puts.
        ClientError: an object exists, another writer was faster, or the store refuses for another reason.
    """
    _check_store(client, address["Bucket"], address["Key"])
    for attempt in range(_NUM_CREATE_ATTEMPTS):
        try:
            client.put_object(**address, Body=data, IfNoneMatch="*")
            return
        except client.exceptions.ClientError as error:
            # 409: another conditional put is under way; a repeated request succeeds or gets 412.
            if code_of(error) not in _CONFLICT or attempt + 1 == _NUM_CREATE_ATTEMPTS:
                raise
            time.sleep(0.1 * 2**attempt)


def _check_store(client: Any, bucket: str, key: str) -> None:
    """Test with an object beside ``key`` whether the store obeys If-None-Match, once per process and bucket."""
    store = os.getpid(), client.meta.endpoint_url, bucket
    with _PROBING:
        if store in _OBEDIENT:
            return
        folder = key.rpartition("/")[0]
        name = f"{folder}/{partial_name()}" if folder else partial_name()
        if not _obeys(client, {"Bucket": bucket, "Key": name}):
            raise StorageError(
                f"s3://{bucket}/{key}: the store at {client.meta.endpoint_url} does not obey conditional puts "
                "(If-None-Match), so two jobs could overwrite each other's versions of a cache; use a store that does: AWS, "
                "Ceph from version 16 on, or MinIO"
            )
        _OBEDIENT.add(store)


def _obeys(client: Any, address: dict[str, str]) -> bool:
    try:
        for _ in range(2):
            try:
                client.put_object(**address, Body=b"", IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                # Even the first put can be refused: if its answer was lost, the retry finds the object it wrote.
                if code_of(error) in EXISTS | _CONFLICT:
                    return True
                if code_of(error) in _UNKNOWN:
                    return False
                raise
        return False
    finally:
        client.delete_object(**address)
