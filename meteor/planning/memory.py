"""Estimate of the memory that training takes on each GPU and each host, by part, before it starts.

Two parts are counted: parameters, from a model on the meta device, and the tensors that a forward pass keeps
(`meteor.planning.activations`). Three are assumed: DeepSpeed's buffers have their default sizes, the backward pass needs as
much again as one layer keeps, and a process needs `OVERHEAD_BYTES`.
"""

from dataclasses import dataclass, field

from meteor.model.answers import CHUNK_TOKENS
from meteor.planning.sizes import BatchSizes, ModelSizes

# CUDA's context and libraries, NCCL's buffers, and gaps that the allocator cannot use.
OVERHEAD_BYTES = 2_500_000_000
# DeepSpeed's defaults, in elements: reduce and all-gather buckets of ZeRO stages 1 and 2, parameters that ZeRO-3 keeps
# gathered, and ZeRO-3's prefetch bucket.
_BUCKET, _MAX_LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
_FP32 = 4


@dataclass(frozen=True)
class Setup:
    """Settings of training that decide about memory.

    Attributes:
        num_workers: number of workers, each with one GPU.
        zero_stage: DeepSpeed's ZeRO stage; 0 is plain torch.
        element_bytes: bytes of one element of weights and activations, 2 or 4.
        checkpointing: whether the backward pass computes the language model's activations again.
        offload_optimizer, offload_param: whether optimiser state and parameters live in the host's memory.
        overhead_bytes: bytes that each process needs, whatever it trains.
    """

    num_workers: int
    zero_stage: int
    element_bytes: int
    checkpointing: bool
    offload_optimizer: bool = False
    offload_param: bool = False
    overhead_bytes: int = OVERHEAD_BYTES


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes by part, in the order in which they are printed.

    Attributes:
        gpu: part -> bytes on each GPU, at the peak.
        checkpoint: bytes of one checkpoint, the parts of all workers together.
        host: part -> bytes on the host per worker.
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


def estimate_memory(sizes: ModelSizes, batch: BatchSizes, setup: Setup) -> MemoryEstimate:
    """Estimate the peak of a step: in the forward and backward pass, or while the optimiser works, whichever is larger.

    The optimiser needs float32 gradients of the masters, at a time when there are no activations. The larger of the two
    counts as "activations".
    """
    own = -(-sizes.trained // setup.num_workers) if setup.zero_stage else sizes.trained
    weights, gathered = _weights(sizes, setup)
    state = {"masters": _FP32 * own, "moments": 2 * _FP32 * own}
    if setup.zero_stage == 0 and setup.element_bytes == _FP32:
        state["masters"] = 0  # the weights are the masters
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
    return MemoryEstimate(
        gpu={part: size for part, size in gpu.items() if size},
        host={part: size for part, size in host.items() if size},
        checkpoint=3 * _FP32 * sizes.trained,
    )


def _weights(sizes: ModelSizes, setup: Setup) -> tuple[int, int]:
    """Return the bytes of weights that stay on the GPU, and of those that ZeRO-3 gathers for a while."""
    whole = (sizes.trained + sizes.frozen) * setup.element_bytes
    if setup.zero_stage != 3:
        return whole, 0
    live = min(_MAX_LIVE + _PREFETCH, sizes.trained + sizes.frozen) * setup.element_bytes
    return 0 if setup.offload_param else -(-whole // setup.num_workers), live


def _gradients(sizes: ModelSizes, setup: Setup, own: int) -> int:
    """Return the bytes of gradients on the GPU, in the type of the weights.

    Up to ZeRO stage 1 they are whole. From stage 2 on a worker holds its part, or none if the optimiser is offloaded.
    """
    if setup.zero_stage >= 2:
        return 0 if setup.offload_optimizer else own * setup.element_bytes
    return sizes.trained * setup.element_bytes


def _buckets(sizes: ModelSizes, setup: Setup) -> int:
    """Return the bytes of communication buckets; there are two, as one is filled while the other is sent."""
    if setup.zero_stage == 0:
        return 0
    return 2 * min(_BUCKET, sizes.trained) * setup.element_bytes


def _activations(sizes: ModelSizes, batch: BatchSizes, setup: Setup) -> dict[str, int]:
    layers = batch.layers
    kept = layers.layer_input if setup.checkpointing else layers.layer
    chunk = min(CHUNK_TOKENS, batch.num_answer_tokens)
    # A chunk has logits in float32, shifted and exponentiated in place, their copy in the weights' type, and the gradients
    # that the loss computes in the forward pass.
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
