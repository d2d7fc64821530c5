"""Memory of training before it starts: what each GPU and each host will hold, by part, as arithmetic.

Counted are parameters (of a model on the meta device) and what a forward pass keeps (`meteor.planning.activations`).
Assumed are DeepSpeed's buffers at their default sizes, a backward pass that needs as much again as one layer keeps, and
`OVERHEAD_BYTES`.
"""

from dataclasses import dataclass, field

from meteor.model.answers import CHUNK_TOKENS
from meteor.planning.sizes import BatchSizes, ModelSizes

# CUDA's context and libraries, NCCL's buffers, and what the allocator cannot use in between.
OVERHEAD_BYTES = 2_500_000_000
# DeepSpeed's defaults, in elements: reduce and all-gather buckets of stages 1 and 2; parameters that ZeRO-3 keeps gathered, and
# its prefetch bucket.
_BUCKET, _MAX_LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
_FP32 = 4


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Attributes:
        num_workers: GPUs.
        zero_stage: 0 is plain torch.
        element_bytes: of weights and activations, 2 or 4.
        checkpointing: activations of the language model are computed again.
        offload_optimizer, offload_param: to the host's memory.
        overhead_bytes: of each process, whatever it trains.
    """

    num_workers: int
    zero_stage: int
    element_bytes: int
    checkpointing: bool
    offload_optimizer: bool = False
    offload_param: bool = False
    overhead_bytes: int = OVERHEAD_BYTES


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, in the order in which they are printed.

    Attributes:
        gpu: of each GPU, at the peak.
        host: of each worker on its host.
        checkpoint: one checkpoint, all workers' parts.
    """

    gpu: dict[str, int]
    checkpoint: int
    host: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def plan_memory(sizes: ModelSizes, batch: BatchSizes, setup: Setup) -> MemoryPlan:
    """The peak of a step: forward and backward, or the optimiser's, whichever is larger.

    Gradients of the masters (float32) exist while the optimiser steps, when no activation does; the larger of the two counts,
    under "activations".
    """
    own = -(-sizes.trained // setup.num_workers) if setup.zero_stage else sizes.trained
    weights, gathered = _weights(sizes, setup)
    state = {"masters": _FP32 * own, "moments": 2 * _FP32 * own}
    if setup.zero_stage == 0 and setup.element_bytes == _FP32:
        state["masters"] = 0  # they are the weights
    at_step = 0 if setup.zero_stage == 0 and setup.element_bytes == _FP32 else _FP32 * own
    host = {}
    if setup.offload_optimizer:
        # Gradients reach the host in float32, and stay there.
        host = {**state, "gradients": _FP32 * own}
        state, at_step = {"masters": 0, "moments": 0}, 0
    if setup.offload_param:
        host["weights"] = setup.element_bytes * own
    activations = _activations(sizes, batch, setup)
    gpu = {
        "weights": weights,
        "gradients": _gradients(sizes, setup, own),
        **state,
        "gathered weights and buckets": gathered + _buckets(sizes, setup),
        "live encoder": sizes.encoder * setup.element_bytes,
        "activations": max(sum(activations.values()), at_step),
        "overhead": setup.overhead_bytes,
    }
    return MemoryPlan(
        gpu={part: size for part, size in gpu.items() if size},
        host={part: size for part, size in host.items() if size},
        checkpoint=3 * _FP32 * sizes.trained,
    )


def _weights(sizes: ModelSizes, setup: Setup) -> tuple[int, int]:
    """What stays on the GPU, and what ZeRO-3 gathers there for a while."""
    whole = (sizes.trained + sizes.frozen) * setup.element_bytes
    if setup.zero_stage != 3:
        return whole, 0
    live = min(_MAX_LIVE + _PREFETCH, sizes.trained + sizes.frozen) * setup.element_bytes
    return 0 if setup.offload_param else -(-whole // setup.num_workers), live


def _gradients(sizes: ModelSizes, setup: Setup, own: int) -> int:
    """In the type of the weights: whole up to stage 1, this worker's part from stage 2 on, none where the host has them."""
    if setup.zero_stage >= 2:
        return 0 if setup.offload_optimizer else own * setup.element_bytes
    return sizes.trained * setup.element_bytes


def _buckets(sizes: ModelSizes, setup: Setup) -> int:
    """Reduction and, in stages 1 and 2, the gathering of updated weights; twice, as one is filled while the other is sent."""
    if setup.zero_stage == 0:
        return 0
    return 2 * min(_BUCKET, sizes.trained) * setup.element_bytes


def _activations(sizes: ModelSizes, batch: BatchSizes, setup: Setup) -> dict[str, int]:
    layers = batch.layers
    kept = layers.layer_input if setup.checkpointing else layers.layer
    chunk = min(CHUNK_TOKENS, batch.num_answer_tokens)
    # Logits in float32, shifted and exponentiated in place, their copy in the weights' type, and the gradients that the loss
    # computes on its way.
    logits = chunk * sizes.vocabulary * (_FP32 + 2 * setup.element_bytes)
    logits += batch.num_answer_tokens * sizes.width * setup.element_bytes
    if sizes.head_trained:
        logits += sizes.vocabulary * sizes.width * (_FP32 + setup.element_bytes)
    return {
        "layers": sizes.num_layers * kept + (layers.layer if setup.checkpointing else 0),
        "backward of a layer": layers.layer,
        "around": layers.around,
        "projector": batch.num_sub_images * sizes.sub_image_bytes,
        "logits": logits,
    }
