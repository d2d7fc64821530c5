"""Writing an object only if there is none: conditional puts, and what is done on stores that do not know them."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from meteor.errors import AlreadyExistsError
from meteor.storage.place import partial_name
from meteor.storage.s3_errors import EXISTS, MISSING, code_of

# Without conditional puts: how long a put may take to overtake another one that looked before it.
SETTLE_S = 2.0
_NUM_CREATE_ATTEMPTS = 5
_CONFLICT = {"ConditionalRequestConflict", "409"}
_UNKNOWN = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest"}
_LOG = logging.getLogger(__name__)

_PROBING = threading.Lock()
# By process, endpoint and bucket.
_SUPPORTED: dict[tuple[int, str, str], bool] = {}


def create(client: Any, uri: str, address: dict[str, str], data: bytes, read: Callable[[], bytes]) -> None:
    """Put ``data`` if there is nothing at the address.

    Raises:
        AlreadyExistsError: there was something, or another writer won.
        ClientError: anything else the store says.
    """
    if not supports_create(client, address["Bucket"], address["Key"]):
        _create_and_look(client, uri, address, data, read)
        return
    for attempt in range(_NUM_CREATE_ATTEMPTS):
        try:
            client.put_object(**address, Body=data, IfNoneMatch="*")
            return
        except client.exceptions.ClientError as error:
            # 409: another conditional put is under way; sent again, this one succeeds or gets 412.
            if code_of(error) not in _CONFLICT or attempt + 1 == _NUM_CREATE_ATTEMPTS:
                raise
            time.sleep(0.1 * 2**attempt)


def supports_create(client: Any, bucket: str, key: str) -> bool:
    """Whether the store obeys If-None-Match; tried beside ``key`` the first time it is asked about the bucket."""
    where = os.getpid(), client.meta.endpoint_url, bucket
    with _PROBING:
        if where not in _SUPPORTED:
            folder = key.rpartition("/")[0]
            name = f"{folder}/{partial_name()}" if folder else partial_name()
            _SUPPORTED[where] = _obeys(client, {"Bucket": bucket, "Key": name})
            if not _SUPPORTED[where]:
                _LOG.warning(
                    "%s (bucket %s) does not obey If-None-Match: of two jobs that publish the same version of a cache at "
                    "the same moment one may be overwritten. Nothing is lost by that, as every finished file has its "
                    "record and the next commit takes it up; but let one job at a time write to a cache there",
                    client.meta.endpoint_url,
                    bucket,
                )
        return _SUPPORTED[where]


def _obeys(client: Any, address: dict[str, str]) -> bool:
    try:
        for _ in range(2):
            try:
                client.put_object(**address, Body=b"", IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                # The first may be refused too: its answer was lost, and sent again it lost against itself.
                if code_of(error) in EXISTS | _CONFLICT:
                    return True
                if code_of(error) in _UNKNOWN:
                    return False
                raise
        return False
    finally:
        client.delete_object(**address)


def _create_and_look(client: Any, uri: str, address: dict[str, str], data: bytes, read: Callable[[], bytes]) -> None:
    try:
        client.head_object(**address)
    except client.exceptions.ClientError as error:
        if code_of(error) not in MISSING:
            raise
    else:
        raise AlreadyExistsError(f"{uri} exists already")
    client.put_object(**address, Body=data)
    time.sleep(SETTLE_S)
    if read() != data:
        raise AlreadyExistsError(f"{uri} exists already: another writer was faster")
