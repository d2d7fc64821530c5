"""Waiting for a cluster that is large enough for a stage's workers."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from meteor.config.settings import RuntimeSettings
from meteor.errors import ClusterError
from meteor.formatting import format_duration
from meteor.planning.workers import WorkerRequest, describe_nodes
from meteor.stopping import raise_if_stopped
from pipelines.ray_parts.runtime import session_is_local

_LOG = logging.getLogger(__name__)
_POLL_S = 2.0
_LINE_EVERY_S = 60.0


def wait_for_nodes(request: WorkerRequest, runtime: RuntimeSettings, *, at_least: int | None = None) -> None:
    """Wait until a stage's workers fit the cluster's nodes.

    Workers of other jobs do not count, as they end some day. A cluster with an autoscaler is asked to grow.

    Args:
        request: the stage's workers.
        runtime: ``wait_for_nodes_minutes`` limits the wait. A local Ray never grows, so that nothing waits for it.
        at_least: number of workers that is enough to start; all if not given.

    Raises:
        ClusterError: the cluster is too small, and did not grow in time.
    """
    enough = request.num if at_least is None else at_least
    limit_s = 0.0 if session_is_local() else 60 * runtime.wait_for_nodes_minutes
    started, next_line_s = time.monotonic(), 0.0
    is_requested = False
    while (num_fitting := request.num_fitting(nodes := alive_nodes())) < enough:
        raise_if_stopped()
        waited_s = time.monotonic() - started
        there = f"the cluster has {describe_nodes(nodes)}, room for {num_fitting}"
        if waited_s >= limit_s:
            raise ClusterError(f"{request.to_text()} are requested, and {there}. {_advice(request, limit_s)}")
        if not is_requested:
            bundle = {"CPU": request.cpus, **({"GPU": request.gpus} if request.gpus else {})}
            request_resources(bundles=[bundle] * request.num)
            is_requested = True
        if waited_s >= next_line_s:
            left = format_duration(limit_s - waited_s)
            _LOG.warning("waiting for nodes: %s are requested, %s; %s left", request.to_text(), there, left)
            next_line_s += _LINE_EVERY_S
        time.sleep(_POLL_S)
    if is_requested:
        # The autoscaler keeps the request until it is replaced, and would never remove the nodes.
        request_resources(bundles=[])
    if num_fitting < request.num:
        _LOG.warning(
            "%s are requested, and the cluster has %s: room for %d",
            request.to_text(),
            describe_nodes(nodes),
            num_fitting,
        )


def _advice(request: WorkerRequest, limit_s: float) -> str:
    if session_is_local():
        return f"Lower {request.settings}, or name a larger cluster by RAY_ADDRESS"
    waited = f"; waited {format_duration(limit_s)}" if limit_s else ""
    return f"Add nodes, lower {request.settings}, or raise runtime.wait_for_nodes_minutes{waited}"


def alive_nodes() -> list[Mapping[str, Any]]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
