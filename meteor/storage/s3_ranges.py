"""Byte ranges over plain HTTP at two thirds of boto3's processor time: a signed URL, a kept connection, no copy in between.

Only the first attempt goes this way. Whatever does not work at once is left to boto3, with its retries and its errors. Over
TLS and through a proxy everything is: certificates and proxies stay boto3's business, and the gain there was not measured.
"""

import http.client
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from meteor.storage import client as settings

# A break loses no more than this.
_WINDOW_BYTES = 1 << 20
_LOCK = threading.Lock()
_POOLS: weakref.WeakKeyDictionary[Any, list[http.client.HTTPConnection]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class FirstRead:
    """What the first attempt at a range brought.

    Attributes:
        num_read: bytes at the beginning of the buffer that are right.
        size_bytes: of the range as far as the object goes.
        etag: of the object, for the rest.
    """

    num_read: int
    size_bytes: int
    etag: str


def read_first(client: Any, address: dict[str, str], start: int, buffer: memoryview) -> FirstRead | None:
    """Read ``buffer`` full from byte ``start`` on, as far as one attempt gets; None when it got nowhere."""
    if not client.meta.endpoint_url.startswith("http://") or "http" in getproxies():
        return None
    # The host is signed and stands in the URL; a range need not be signed.
    url = urlsplit(client.generate_presigned_url("get_object", Params=address))
    headers = {"Range": f"bytes={start}-{start + len(buffer) - 1}"}
    pool, first = _pool_of(client), None
    connection = pool.pop() if pool else http.client.HTTPConnection(url.netloc, timeout=settings.CONNECT_TIMEOUT_S)
    # What is wrong does not matter here: boto3 meets it again, and tells.
    with suppress(OSError, http.client.HTTPException):
        if connection.sock is None:
            connection.connect()
            opened: Any = connection.sock
            opened.settimeout(settings.READ_TIMEOUT_S)
        connection.request("GET", f"{url.path}?{url.query}", headers=headers)
        response = connection.getresponse()
        first = _read_body(response, buffer) if response.status == http.client.PARTIAL_CONTENT else None
    if first and first.num_read == first.size_bytes:
        pool.append(connection)
    else:
        # Not read to its end, it would give the rest to the next request.
        connection.close()
    return first


def _read_body(response: http.client.HTTPResponse, buffer: memoryview) -> FirstRead | None:
    size_bytes, etag = int(response.headers.get("Content-Length", 0)), response.headers.get("ETag", "")
    if not (0 < size_bytes <= len(buffer) and etag):
        return None
    num_read = 0
    with suppress(OSError, http.client.HTTPException):
        while count := response.readinto(buffer[num_read : min(num_read + _WINDOW_BYTES, size_bytes)]):
            num_read += count
    return FirstRead(num_read, size_bytes, etag)


def _pool_of(client: Any) -> list[http.client.HTTPConnection]:
    """The idle connections that belong to a client; as many as were ever used at once, closed with the client."""
    with _LOCK:
        if client not in _POOLS:
            _POOLS[client] = []
            weakref.finalize(client, _close_all, _POOLS[client])
        return _POOLS[client]


def _close_all(pool: list[http.client.HTTPConnection]) -> None:
    for connection in pool:
        connection.close()
