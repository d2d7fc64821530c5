"""Caches and proxies for tests against a real S3 server."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import botocore.endpoint
import pytest
from proxy import Proxy, Schedule, fault_proxy

from meteor.storage import client, s3


@pytest.fixture
def through_proxy(
    ceph_endpoint: str, ceph_root: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Proxy]]:
    """Puts a proxy with a schedule between this process and the server; `ceph_root` stays the place."""
    with ExitStack() as stack:

        def start(schedule: Schedule) -> Proxy:
            proxy = stack.enter_context(fault_proxy(ceph_endpoint, schedule))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            return proxy

        yield start


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits: what is tested is how often, not how long."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(s3, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(
        botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)))
    )
