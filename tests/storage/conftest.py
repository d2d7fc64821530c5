"""Places to put files, for the tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(params=["disk", "s3", pytest.param("ceph", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place on local disk, on a mock of S3 and on a real S3 server."""
    return str(tmp_path / "root") if request.param == "disk" else request.getfixturevalue(f"{request.param}_root")
