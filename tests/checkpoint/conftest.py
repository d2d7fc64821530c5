"""The folder of checkpoints, on local disk and on S3."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "checkpoints") if request.param == "disk" else request.getfixturevalue("s3_root")
