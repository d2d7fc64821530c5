"""A Ray cluster of several machines with an object store and a tracking server; stopped at the end, whatever happens."""

import os
import re
import secrets
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from ceph import ACCESS_KEY, SECRET_KEY, ceph_gateway
from machines import Machine, Network, network
from services import TrackingServer, postgres

BUCKET = "meteor"
_TIMEOUT_S = 180.0
# What a node of the cluster leaves to Ray's object store: images of the tests are small.
_OBJECT_STORE = "--object-store-memory=300000000"


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        head: with the job server on its loopback, and no CPUs for workers.
        workers: by name, those that were killed left out.
        laptop: where jobs are submitted: it reaches the job server, has the repository, and none of the head's files.
        tracking: MLflow's server.
        environment: of every machine, with the credentials.
        logs: folder with what each process printed.
    """

    network: Network
    head: Machine
    laptop: Machine
    tracking: TrackingServer
    environment: dict[str, str]
    logs: Path
    workers: dict[str, Machine]

    def add_worker(self, name: str, *, num_cpus: int = 2) -> Machine:
        """Start a node that joins as soon as the head is there."""
        machine = self.network.machine(name, self.environment)
        start = f"ray start --block --address={self.head.address}:6379 --node-ip-address={machine.address}"
        options = f"--num-cpus={num_cpus} --disable-usage-stats --metrics-export-port=8080 {_OBJECT_STORE}"
        machine.start("sh", "-c", f"until {start} {options}; do sleep 1; done", log=self.logs / f"{name}.log")
        self.workers[name] = machine
        return machine

    def kill_worker(self, name: str) -> None:
        """A node goes at once, with all that runs on it."""
        self.workers.pop(name).kill()

    def submit(self, command: str, *, log: str) -> subprocess.Popen[bytes]:
        """Type a command on the laptop, in the repository."""
        return self.laptop.start("sh", "-c", command, log=self.logs / log, in_repository=True)

    def run(self, command: str, *, log: str) -> str:
        """The same; what it printed when it has ended well. Raises RuntimeError with it where it has not."""
        status = self.submit(command, log=log).wait()
        text = (self.logs / log).read_text()
        if status:
            raise RuntimeError(f"{command} ended with {status}:\n{text[-6000:]}")
        return text

    def on_head(self, *command: str) -> str:
        """What a command prints that reaches the head's loopback, and this machine's files."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.head.namespace, *command],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **self.environment},
        )
        return done.stdout


class Scraper:
    """Looks at the nodes' metrics ports as Prometheus would, and remembers the names of our own metrics.

    Gauges go with the process that set them, so that one look at the end would miss them.
    """

    def __init__(self, one: Cluster) -> None:
        self.names: set[str] = set()
        self._cluster, self._stop = one, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="scraper", daemon=True)

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            for machine in self._cluster.network.machines:
                try:
                    with urllib.request.urlopen(f"http://{machine.address}:8080/metrics", timeout=2) as answer:
                        text = answer.read().decode()
                except OSError:
                    continue  # killed, or not there yet
                self.names |= set(re.findall(r"^(ray_meteor_\w+)\{", text, re.MULTILINE))


@contextmanager
def cluster(logs: Path, *, workers: tuple[str, ...] = ("one", "two")) -> Iterator[Cluster]:
    """Start all of it; `logs` is a folder for what the processes print."""
    with ExitStack() as stack:
        net = stack.enter_context(network())
        store = {
            "AWS_ENDPOINT_URL": stack.enter_context(ceph_gateway(net.address)),
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }
        session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
        session.client("s3", endpoint_url=store["AWS_ENDPOINT_URL"]).create_bucket(Bucket=BUCKET)
        database = stack.enter_context(postgres())
        tracking = TrackingServer(net.address, database, f"s3://{BUCKET}/mlflow", store, logs / "mlflow.log")
        tracking.start()
        stack.callback(tracking.stop)
        environment = {
            **store,
            "MLFLOW_TRACKING_URI": tracking.uri,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "HF_HUB_OFFLINE": "1",
            "METEOR_LOG_FORMAT": "json",
        }
        head = net.machine("head", environment)
        head.start(
            *("ray", "start", "--head", "--block", f"--node-ip-address={head.address}", "--port=6379"),
            *("--dashboard-host=127.0.0.1", "--num-cpus=0", "--disable-usage-stats", "--metrics-export-port=8080"),
            _OBJECT_STORE,
            log=logs / "head.log",
        )
        # As behind `kubectl port-forward`: it shares the head's network, and nothing else.
        laptop = Machine(
            "laptop", head.address, head.namespace, {**environment, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
        )
        stack.callback(laptop.kill)
        found = Cluster(net, head, laptop, tracking, environment, logs, {})
        for name in workers:
            found.add_worker(name)
        wait_for("the job server", lambda: _answers(found))
        yield found


def _answers(one: Cluster) -> bool:
    return one.submit("ray job list", log="waiting.log").wait() == 0


def wait_for(
    what: str, condition: Callable[[], object], *, timeout_s: float = _TIMEOUT_S, every_s: float = 0.2
) -> None:
    """Raises TimeoutError where the condition does not come."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what} did not come within {timeout_s:.0f} s")
        time.sleep(every_s)
