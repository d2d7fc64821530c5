"""One fingerprint for a set of weights, whatever file format or library version they were loaded through."""

import hashlib
from collections.abc import Mapping

import torch


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of their names.

    `.bin` and `.safetensors` of the same weights agree, as do names with and without the leading ``vision_model.``
    (transformers 5 dropped it). Index buffers (``position_ids``) are skipped: older checkpoints carry them, newer do not.
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
