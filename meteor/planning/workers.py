"""Workers that stages request from the cluster, and how many of them fit its nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meteor.config.settings import RuntimeSettings
from meteor.formatting import format_amount

# A sum of fractions of a GPU may end a little below the whole.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WorkerRequest:
    """Request for a number of equal workers.

    Attributes:
        kind: name of one such worker in messages, for example "training worker".
        num: number of workers.
        cpus, gpus: CPU cores and GPUs of each worker; a worker lies on one node.
        settings: names of the settings that decide about the request, for messages.
    """

    kind: str
    num: int
    cpus: float
    gpus: float
    settings: str

    def to_text(self) -> str:
        """Return text such as "2 training workers with 1 CPU and 1 GPU each"."""
        each = [format_amount(self.cpus, "CPU"), *([format_amount(self.gpus, "GPU")] if self.gpus else [])]
        return f"{format_amount(self.num, self.kind)} with {' and '.join(each)} each"

    def num_fitting(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """Return how many of the workers fit on nodes with these resources."""
        wanted = {kind: amount for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}
        fitting = sum(
            min(int(node.get(kind, 0) / amount + _ROUNDING) for kind, amount in wanted.items()) for node in nodes
        )
        return min(self.num, fitting)


def training_request(runtime: RuntimeSettings) -> WorkerRequest:
    """Return the request for the workers of pretrain and finetune."""
    names = "runtime.num_workers, runtime.cpus_per_worker or runtime.gpus_per_worker"
    return WorkerRequest(
        "training worker", runtime.num_workers, runtime.cpus_per_worker, runtime.gpus_per_worker, names
    )


def encoding_request(runtime: RuntimeSettings) -> WorkerRequest:
    """Return the request for the encoder actors of cache_features."""
    names = "runtime.num_encoders, runtime.cpus_per_encoder or runtime.gpus_per_encoder"
    return WorkerRequest("encoder", runtime.num_encoders, runtime.cpus_per_encoder, runtime.gpus_per_encoder, names)


def answering_request(runtime: RuntimeSettings) -> WorkerRequest:
    """Return the request for the answering actors of evaluate."""
    names = "runtime.num_evaluators, runtime.cpus_per_worker or runtime.gpus_per_worker"
    return WorkerRequest("evaluator", runtime.num_evaluators, runtime.cpus_per_worker, runtime.gpus_per_worker, names)


def describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    """Return text such as "2 nodes with 16 CPUs and 4 GPUs in all"."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    cpus, gpus = (format_amount(amount, kind) for kind, amount in total.items())
    return f"{format_amount(len(nodes), 'node')} with {cpus} and {gpus} in all"
