"""Checks before a long run: storage, models, data, MLflow, GPUs and versions, on every node of the cluster."""

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.node_checks import Finding, check_node, differing, gpus, versions
from meteor import storage
from meteor.clusters import joining
from meteor.command_line import DIFFERS, OK, add_run, parse, read_run, run_command
from meteor.config import RunSettings
from meteor.planning.workers import answering_request, describe_nodes, encoding_request, training_request
from meteor.stopping import keep_listening, stoppable

_DESCRIPTION = """Check everything that a run needs, on every node of the cluster: storage (write, read, conditional put),
models, data, MLflow, GPUs, versions. Nothing is trained, and temporary files are deleted."""
_EPILOG = """On a cluster: ray job submit --working-dir . -- python -m jobs.preflight --run RUN, or python -m jobs.submit
preflight --run RUN --wait. Without a cluster, this machine is checked. Exit status: 0 if all checks pass, 1 if a check
failed, 2 after an error."""
# The checks copy the language model to the node's disk, which takes minutes for 26 GB.
_NODE_TIMEOUT_S = 1800.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m jobs.preflight", description=_DESCRIPTION, epilog=_EPILOG)
    add_run(parser)
    arguments = parse(parser, argv)
    with stoppable():
        return run_command(lambda: check_cluster(read_run(arguments)))


def check_cluster(settings: RunSettings) -> int:
    """Check every node and print what was found; the exit status is 1 if a check failed."""
    address = settings.runtime.ray_address or os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False}
    try:
        with joining(address), keep_listening():
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **local)
        return report(settings, look(settings))
    finally:
        ray.shutdown()


def look(settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Return findings, GPUs, versions and resources by node; this process's node comes first."""
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    marker = storage.join(settings.output, "preflight", f"marker-{uuid.uuid4().hex}")
    storage.write_bytes(marker, b"")
    try:
        started = {}
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = _look.options(num_cpus=0, scheduling_strategy=strategy)
            started[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = (
                task.remote(settings, len(nodes), marker, is_driver=node["NodeID"] == here),
                node["Resources"],
            )
        return {name: {**_answer(reference), "resources": has} for name, (reference, has) in started.items()}
    finally:
        storage.delete(marker)


@ray.remote(max_retries=0)
def _look(settings: RunSettings, num_nodes: int, marker: str, *, is_driver: bool) -> dict[str, Any]:
    findings = check_node(settings, num_nodes, marker, is_driver=is_driver)
    return {"findings": findings, "gpus": gpus(), "versions": versions()}


def _answer(reference: Any) -> dict[str, Any]:
    """Return a node's results; if the node does not answer, that is a finding too."""
    try:
        return ray.get(reference, timeout=_NODE_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        text = str(error).strip().splitlines()[-1]
        return {"findings": [Finding("node", False, f"cannot be checked: {text}")], "gpus": [], "versions": {}}


def report(settings: RunSettings, nodes: dict[str, dict[str, Any]]) -> int:
    """Print all results and return the exit status: 0 if all checks passed, otherwise 1."""
    num_wrong = 0
    for name, node in nodes.items():
        has = node["resources"]
        found = ", ".join(sorted(set(node["gpus"]))) or "none"
        print(f"{name}: {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs ({found})")
        for finding in node["findings"]:
            print(f"  {'ok  ' if finding.ok else 'FAIL'} {finding.check}: {finding.text}")
            num_wrong += not finding.ok
    different = differing({name: node["versions"] for name, node in nodes.items() if node["versions"]})
    for line in different:
        print(f"FAIL versions: {line}")
    if not different:
        known = next(iter(nodes.values()))["versions"]
        print("ok   versions: " + ", ".join(f"{package} {version}" for package, version in known.items()))
    for line in wanting(settings, nodes):
        print(f"note {line}")
    num_wrong += len(different)
    print(f"{num_wrong} of the checks failed" if num_wrong else f"{settings.name}: {len(nodes)} nodes are ready")
    return DIFFERS if num_wrong else OK


def wanting(settings: RunSettings, nodes: dict[str, dict[str, Any]]) -> list[str]:
    """List the workers that the run asks for and the cluster has no room for now; an autoscaler may still add nodes."""
    there = [node["resources"] for node in nodes.values()]
    requests = [make(settings.runtime) for make in (encoding_request, training_request, answering_request)]
    return [
        f"{request.to_text()} are requested, and the cluster has {describe_nodes(there)}, room for "
        f"{request.num_fitting(there)} now: stages wait for nodes for {settings.runtime.wait_for_nodes_minutes:g} minutes"
        for request in requests
        if request.num_fitting(there) < request.num
    ]


if __name__ == "__main__":
    sys.exit(main())
