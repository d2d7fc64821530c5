"""Places to put files, for the tests of this folder."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meteor import storage
from meteor.errors import AlreadyExistsError


@pytest.fixture(params=["disk", "s3", pytest.param("ceph", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place on local disk, on a mock of S3 and on a real S3 server."""
    return str(tmp_path / "root") if request.param == "disk" else request.getfixturevalue(f"{request.param}_root")


@pytest.fixture
def race_to_create() -> Callable[[str], None]:
    """Create a file from eight threads at once: exactly one succeeds, and the file is that thread's."""

    def race(uri: str) -> None:
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

    return race
