"""The S3 client of this process with its settings, time-outs and retries; this module imports boto3."""

import functools
import os
import threading
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from meteor.optional import import_optional

# A store that is up accepts within milliseconds; ten seconds cover a restart of its gateway.
CONNECT_TIMEOUT_S = 10.0
# Longest silence. A recovering Ceph cluster, or the end of a large multi-part upload, may send nothing for tens of seconds.
READ_TIMEOUT_S = 60.0
# Attempts per request. The pauses are random and double up to 3 s after errors (up to 20 s when the store says "slow
# down"), which is long enough for a gateway to restart. AWS_MAX_ATTEMPTS overrides this number.
NUM_ATTEMPTS = 8
# If more threads than this send requests, botocore closes the extra connections after each request.
NUM_CONNECTIONS = 64

_MAKING = threading.Lock()


def boto3_module(name: str) -> ModuleType:
    """Import a module of boto3's family. Raises MissingPackageError with the command that installs it."""
    return import_optional(name, needed_for="Reading and writing s3:// URIs", install="pip install 'boto3>=1.40'")


def s3_client() -> Any:
    """Return the client for the current environment variables; it is safe to use from many threads."""
    # A client does not survive a fork, and reads the environment only when it is made: both are part of the cache's key.
    environment = tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # Making a client takes 0.1 s; the lock keeps threads that start together from making one each.
    with _MAKING:
        return _new_s3_client(os.getpid(), environment, CONNECT_TIMEOUT_S, READ_TIMEOUT_S)


def is_aws(client: Any) -> bool:
    """Return whether the client talks to AWS itself, not to another store with the S3 protocol."""
    return ".amazonaws.com" in (urlsplit(client.meta.endpoint_url).hostname or "")


def num_attempts(client: Any) -> int:
    """Return how often the client sends a request before it gives up."""
    return int(client.meta.config.retries["total_max_attempts"])


@functools.lru_cache(maxsize=8)
def _new_s3_client(
    process_id: int, environment: tuple[tuple[str, str], ...], connect_timeout_s: float, read_timeout_s: float
) -> Any:
    # This client needs its own session: boto3's default session must not be used from several threads.
    session = boto3_module("boto3").session.Session()
    options: dict[str, Any] = {
        "max_pool_connections": NUM_CONNECTIONS,
        "connect_timeout": connect_timeout_s,
        "read_timeout": read_timeout_s,
        "tcp_keepalive": True,
        "retries": {
            "mode": "standard",
            "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", NUM_ATTEMPTS)),
        },
    }
    config = boto3_module("botocore.config").Config
    region = os.environ.get("AWS_REGION") or session.region_name
    client = session.client("s3", region_name=region, config=config(**options))
    if not is_aws(client):
        # Many stores other than AWS refuse the checksums that boto3 sends by default since 1.36.
        options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        client = session.client("s3", region_name=region, config=config(**options))
    client.meta.events.register("before-parse.s3.*", _refuse_cut_answer)
    return client


def _refuse_cut_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Turn an answer that was cut short into an error 500, which botocore retries.

    botocore does not check Content-Length, and reads a listing without any body as an empty listing. A commit would then
    lose rows, and a clean-up would delete files that are needed.
    """
    has_body = not operation_model.has_streaming_output and operation_model.http["method"] != "HEAD"
    if not has_body or response_dict["status_code"] >= 300:
        return
    num_bytes = len(response_dict["body"])
    expected = response_dict["headers"].get("content-length")
    is_empty_list = operation_model.name.startswith("List") and not num_bytes
    if is_empty_list or (expected is not None and int(expected) != num_bytes):
        response_dict["status_code"], response_dict["body"] = 500, b""
