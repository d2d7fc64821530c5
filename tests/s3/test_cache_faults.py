"""The cache on a real S3 server: through faults and kills every image is served once and is what was written."""

import pytest
from runs import Outcome, run

pytestmark = pytest.mark.s3


@pytest.mark.usefixtures("ceph_root")
@pytest.mark.parametrize("kill", [False, True], ids=["", "kill"])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_lost_and_nothing_is_served_twice(ceph_endpoint: str, seed: int, kill: bool) -> None:
    outcome = run(ceph_endpoint, seed=seed, kill=kill)
    assert outcome.num_faults > 10
    assert outcome == Outcome(outcome.num_faults, outcome.num_written, num_lost=0, num_duplicated=0, problems=())
