"""Fingerprint of a set of weights, independent of file format and library version."""

import hashlib
from collections.abc import Mapping

import torch


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every tensor, in the order of names.

    Equal weights have equal digests in `.bin` and `.safetensors` files, and with or without the leading ``vision_model.``
    in names (transformers 5 dropped it). Index buffers (``position_ids``) are skipped, because only older checkpoints
    contain them.
    """
    canonical = {name.rpartition("vision_model.")[2]: tensor for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(canonical):
        if name.endswith("position_ids"):
            continue
        tensor = canonical[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
