"""The S3 client of this process: where it gets its settings, how long it waits, how often it tries. Imports boto3."""

import functools
import os
import threading
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from meteor.optional import import_optional

# A store that is up accepts within milliseconds; ten seconds cover a restart of its gateway.
CONNECT_TIMEOUT_S = 10.0
# Without a byte. A Ceph cluster that recovers, and the end of a large multi-part upload, may be silent for tens of seconds.
READ_TIMEOUT_S = 60.0
# Of one request. The pauses are random and double up to 3 s after errors (up to 20 s when the store says "slow down"), so
# that a gateway may restart in the meantime. AWS_MAX_ATTEMPTS overrides it.
NUM_ATTEMPTS = 8
# More threads than this open connections that are not kept.
NUM_CONNECTIONS = 64

_MAKING = threading.Lock()


def boto3_module(name: str) -> ModuleType:
    """A module of boto3's family, or MissingPackageError with the line that installs it."""
    return import_optional(name, needed_for="Reading and writing s3:// URIs", install="pip install 'boto3>=1.40'")


def s3_client() -> Any:
    """The client for the environment as it is now; safe to use from many threads."""
    # A client does not survive a fork, and takes its configuration from the environment when it is made.
    environment = tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # Locked, so that threads that start together do not make one each: it takes 0.1 s.
    with _MAKING:
        return _new_s3_client(os.getpid(), environment, CONNECT_TIMEOUT_S, READ_TIMEOUT_S)


def is_aws(client: Any) -> bool:
    """Whether the client talks to AWS itself."""
    return ".amazonaws.com" in (urlsplit(client.meta.endpoint_url).hostname or "")


def num_attempts(client: Any) -> int:
    """How often the client sends one request before it gives up."""
    return int(client.meta.config.retries["total_max_attempts"])


@functools.lru_cache(maxsize=8)
def _new_s3_client(
    process_id: int, environment: tuple[tuple[str, str], ...], connect_timeout_s: float, read_timeout_s: float
) -> Any:
    # A session of its own: boto3's shared one must not be used from several threads.
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
        # The default checksums of newer clients are refused by many stores other than AWS.
        options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        client = session.client("s3", region_name=region, config=config(**options))
    client.meta.events.register("before-parse.s3.*", _refuse_cut_answer)
    return client


def _refuse_cut_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Turn an answer that was cut short into an error 500, which is tried again.

    botocore does not compare Content-Length, and takes a listing of which nothing arrived for an empty one: a commit
    would lose rows by it, and a clean-up would delete what is needed.
    """
    has_body = not operation_model.has_streaming_output and operation_model.http["method"] != "HEAD"
    if not has_body or response_dict["status_code"] >= 300:
        return
    num_bytes = len(response_dict["body"])
    expected = response_dict["headers"].get("content-length")
    is_empty_list = operation_model.name.startswith("List") and not num_bytes
    if is_empty_list or (expected is not None and int(expected) != num_bytes):
        response_dict["status_code"], response_dict["body"] = 500, b""
