"""Workers that fit nodes, worked by hand."""

import pytest

from meteor.config.settings import RuntimeSettings
from meteor.planning.workers import WorkerRequest, describe_nodes, training_request

NODES = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}]


@pytest.mark.parametrize(
    ("cpus", "gpus", "num_fitting"),
    [
        (1, 1, 8),  # four by GPUs on the first node, four by CPUs on the second
        (8, 1, 2),  # the second node has too few CPUs for any
        (8, 0, 10),
        (1, 0.5, 12),  # eight and four
        (1, 8, 1),
        (1, 16, 0),  # no node has as many, though there are twelve in all
        (0.1, 0.1, 12),
    ],
)
def test_a_worker_lies_on_one_node(cpus, gpus, num_fitting):
    assert WorkerRequest("workers", 12, cpus, gpus, "").num_fitting(NODES) == num_fitting


def test_a_request_and_the_cluster_are_said_in_words():
    runtime = RuntimeSettings(num_workers=2, cpus_per_worker=1, gpus_per_worker=0.5)
    assert training_request(runtime).to_text() == "2 training workers with 1 CPU and 0.5 GPUs each"
    assert describe_nodes(NODES[:2]) == "2 nodes with 20 CPUs and 12 GPUs in all"
