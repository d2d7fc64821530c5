"""Chunk size of the vision tower: chosen from the device's free memory, and batches cut to chunks."""

from collections.abc import Sequence
from typing import Any

import torch

from meteor.vision.towers import TowerShape

# 113 full sub-images of 577 tokens. This is an estimate of where a GPU's matrix products stop getting faster;
# `benchmarks/encoding_gpu.py` measures it.
MAX_TOKENS_CUDA = 65_536
# A single full sub-image, whose activations stay in the CPU's caches. Twelve at once took 15 % longer (1 thread, widths
# 384 and 1024).
MAX_TOKENS_CPU = 640
# Share of the device's free memory that one pass may fill.
_SHARE_OF_FREE = 0.5


def max_tokens_for(model: Any, device: torch.device) -> int:
    """Return the most tokens per chunk: what fits into half of the free memory, at most `MAX_TOKENS_CUDA`."""
    if device.type != "cuda":
        return MAX_TOKENS_CPU
    free_bytes = torch.cuda.mem_get_info(device)[0]
    # Memory that torch has reserved but does not use is free too.
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(int(free_bytes * _SHARE_OF_FREE) // bytes_per_token(model), MAX_TOKENS_CUDA))


def bytes_per_token(model: Any) -> int:
    """Return an upper bound of the memory that a token needs in the tower, in bytes.

    Let C be the width and I the inner width of the MLP. The MLP's step holds the hidden state twice (the selected layer is
    kept), its norm, its output and two tensors of width I; three if the MLP is gated, and its output twice if LayerScale
    multiplies it. Attention's step holds seven tensors of width C and the keys in float32, which is less for the usual I = 4 C.
    While embedding, a patch exists twice in float32 and once in the tower's dtype.
    """
    shape, itemsize = TowerShape.of(model.config), model.dtype.itemsize
    width, scaled = shape.width, hasattr(model.config, "layerscale_value")
    mlp = itemsize * ((4 + scaled) * width + (2 + shape.gated_mlp) * shape.mlp_width)
    attention = itemsize * (7 + scaled) * width + 4 * width
    embedding = (8 + itemsize) * 3 * shape.patch_size**2 + itemsize * 2 * width
    return max(mlp, attention, embedding)


def split_evenly(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut ``order`` into chunks of about equal length, with at most ``max_tokens`` but at least one sub-image each.

    Args:
        order: indices of sub-images.
        lengths: number of tokens of each sub-image, by index.
        max_tokens: most tokens of a chunk.
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
