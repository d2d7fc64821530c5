"""How many tokens go through the tower at once: chosen from the memory that is free, and batches cut to it."""

from collections.abc import Sequence
from typing import Any

import torch

# 113 full sub-images of 577 tokens: an estimate of where a GPU's matrix products stop getting faster, not yet measured on one
# (`benchmarks/encoding_gpu.py` does).
MAX_TOKENS_CUDA = 65_536
# One full sub-image: its activations stay in the caches. Twelve at once took 15 % longer (1 thread, widths 384 and 1024).
MAX_TOKENS_CPU = 640
_SHARE_OF_FREE = 0.5


def max_tokens_for(model: Any, device: torch.device) -> int:
    """The largest chunk for a tower on this device: half of the free memory, at most where throughput stops rising."""
    if device.type != "cuda":
        return MAX_TOKENS_CPU
    free_bytes = torch.cuda.mem_get_info(device)[0]
    # What torch holds and does not use is free too.
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(int(free_bytes * _SHARE_OF_FREE) // bytes_per_token(model), MAX_TOKENS_CUDA))


def bytes_per_token(model: Any) -> int:
    """Upper bound of the memory one token needs while it goes through the tower.

    With C the width, I the inner width of the MLP and F the values of a patch: the MLP's step holds the hidden state twice
    (the selected layer is kept), its norm, its output and two tensors of width I; attention's step, with six of width C and
    the keys in float32, stays below that for the usual I = 4 C. While embedding, a patch is there twice in float32 and once in
    the tower's type.
    """
    config, itemsize = model.config, model.embeddings.patch_embedding.weight.dtype.itemsize
    width, inner = config.hidden_size, config.intermediate_size
    mlp = itemsize * (4 * width + 2 * inner)
    attention = itemsize * 7 * width + 4 * width
    embedding = (8 + itemsize) * 3 * config.patch_size**2 + itemsize * 2 * width
    return max(mlp, attention, embedding)


def split_evenly(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut ``order`` into chunks of about equal token counts of at most ``max_tokens`` (one sub-image at least).

    Args:
        order: indices of sub-images.
        lengths: tokens of each sub-image, by index.
        max_tokens: of one chunk.
    """
    total = sum(lengths[i] for i in order)
    target = total / max(1, -(-total // max_tokens))
    chunks: list[list[int]] = []
    held = 0
    for i in order:
        if not chunks or held >= target or held + lengths[i] > max_tokens:
            chunks.append([])
            held = 0
        chunks[-1].append(i)
        held += lengths[i]
    return chunks
