"""The cluster, with the demo's data in its object store: images and models whose weights are random."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ceph import missing_programs as missing_ceph

from meteor import storage
from meteor.synthetic.dataset import write_dataset
from meteor.synthetic.models import make_tiny_models

sys.path.insert(0, str(Path(__file__).parent))
from cluster import BUCKET, Cluster, cluster
from machines import why_not
from services import missing_programs as missing_postgres


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests marked ``cluster``; skipped where the machine has not what it takes."""
    if missing := [*missing_ceph(), *missing_postgres()]:
        pytest.skip(f"{', '.join(missing)} not found: `make test-cluster` installs them")
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("small")
    write_dataset(folder / "data", num_scenes=160, num_held_out=24)
    make_tiny_models(folder / "models", train_steps=0, num_threads=1, report=lambda line: None)
    add_broken_image(folder / "data")
    logs = tmp_path_factory.mktemp("logs")
    print(f"\nlogs of the cluster: {logs}")
    with cluster(logs) as found, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in found.environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        for kind in ("data", "models"):
            for file in (folder / kind).rglob("*"):
                if file.is_file():
                    storage.upload_file(str(file), f"s3://{BUCKET}/{kind}/demo/{file.relative_to(folder / kind)}")
        yield found


def add_broken_image(data: Path) -> None:
    """One that nobody can read, in a sample of stage 1."""
    (data / "images/broken.png").write_bytes(b"no image")
    samples = json.loads((data / "pretrain.json").read_text())
    samples.append({**samples[0], "id": "broken", "image": "broken.png"})
    (data / "pretrain.json").write_text(json.dumps(samples))
