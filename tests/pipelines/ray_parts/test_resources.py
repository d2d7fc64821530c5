"""A cluster that is too small: waited for while it may grow, refused where it cannot."""

import pytest

from meteor.config.settings import RuntimeSettings
from meteor.errors import ClusterError
from meteor.planning.workers import training_request
from pipelines.ray_parts import resources


@pytest.fixture
def cluster(monkeypatch):
    """Two CPUs, with two more at each look; the clock stands still but for sleeps."""
    state = {"nodes": [{"CPU": 2.0}], "grows": True, "now_s": 0.0, "local": False, "asked": []}

    def sleep(seconds):
        state["now_s"] += seconds
        if state["grows"]:
            state["nodes"] = [*state["nodes"], {"CPU": 2.0}]

    monkeypatch.setattr(resources, "alive_nodes", lambda: state["nodes"])
    monkeypatch.setattr(resources, "session_is_local", lambda: state["local"])
    monkeypatch.setattr(resources, "request_resources", lambda bundles: state["asked"].append(bundles))
    monkeypatch.setattr(resources.time, "sleep", sleep)
    monkeypatch.setattr(resources.time, "monotonic", lambda: state["now_s"])
    return state


def wait(**runtime):
    settings = RuntimeSettings(**runtime)
    resources.wait_for_nodes(training_request(settings), settings)


def test_a_stage_starts_when_nodes_have_joined(cluster, caplog):
    wait(num_workers=6)
    assert len(cluster["nodes"]) == 3
    # The autoscaler is asked for all workers, and then left to itself.
    assert cluster["asked"] == [[{"CPU": 1.0}] * 6, []]
    [line] = [record.getMessage() for record in caplog.records]
    assert "6 training workers with 1 CPU each are requested, the cluster has 1 node with 2 CPUs and 0 GPUs" in line
    assert "room for 2; 15 min 00 s left" in line


def test_a_cluster_that_does_not_grow_is_given_up_after_the_time_set(cluster):
    cluster["grows"] = False
    with pytest.raises(ClusterError, match=r"and 1 GPU each are requested(.|\n)*room for 0(.|\n)*waited 1 min 00 s"):
        wait(num_workers=1, gpus_per_worker=1, wait_for_nodes_minutes=1)
    assert cluster["now_s"] == 60


def test_a_local_ray_never_grows(cluster):
    cluster["local"] = True
    with pytest.raises(ClusterError, match=r"room for 2\. Lower runtime\.num_workers"):
        wait(num_workers=3)
    assert cluster["asked"] == []
    wait(num_workers=2)
