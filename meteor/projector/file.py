"""Trained projectors as safetensors: pretrain's file, and tensors read by range from a model's files."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from meteor import storage
from meteor.checkpoint.header import read_header
from meteor.errors import CheckpointError
from meteor.projector.output import Projector

_METADATA, _DIGEST = "meteor", "digest"
_NUM_SHOWN = 3


def write_projector_file(uri: str, weights: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write ``projector.safetensors`` with ``description`` (JSON values) and the digest of all content in its metadata."""
    # As a reader will see it: lists instead of tuples.
    plain = json.loads(json.dumps(description))
    metadata = {_METADATA: json.dumps(plain), _DIGEST: _digest(plain, weights), "format": "pt"}
    storage.write_bytes(uri, save(dict(weights), metadata))


def read_projector_file(uri: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a projector file.

    Returns:
        The description, empty if the file has none, and the weights by name.

    Raises:
        NotFoundError: the file does not exist.
        CheckpointError: the file is not in safetensors format, or its content is not what was written.
    """
    metadata, weights = read_tensors(uri)
    try:
        description = dict(json.loads(metadata.get(_METADATA, "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{uri}: its metadata is damaged ({error}); export the projector again") from error
    # Files of other programs carry neither.
    if metadata.keys() & {_METADATA, _DIGEST} and metadata.get(_DIGEST) != _digest(description, weights):
        raise CheckpointError(
            f"{uri} is damaged: its weights or settings do not match their digest. Restore it from a copy, or run pretrain "
            "again"
        )
    return description, weights


def projector_digest(uri: str) -> str:
    """Return the sha256 over description and tensors of a projector file; errors as `read_projector_file`.

    The file's bytes would not do: safetensors writes its metadata in random order.
    """
    return _digest(*read_projector_file(uri))


def _digest(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_model_weights(folder_uri: str, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a Hugging Face directory whose names begin with ``prefix``, and no others.

    Returns:
        The tensors by name, without the prefix.

    Raises:
        NotFoundError: the directory has no safetensors files.
        CheckpointError: a file is not in safetensors format, or lacks tensors that the directory's index lists.
    """
    index_uri = storage.join(folder_uri, "model.safetensors.index.json")
    if not storage.exists(index_uri):
        return read_tensors(storage.join(folder_uri, "model.safetensors"), prefix)[1]
    places = storage.read_json(index_uri)["weight_map"]
    promised = {name.removeprefix(prefix) for name in places if name.startswith(prefix)}
    weights: dict[str, torch.Tensor] = {}
    for file in sorted({file for name, file in places.items() if name.startswith(prefix)}):
        weights |= read_tensors(storage.join_below(folder_uri, file), prefix)[1]
    if weights.keys() != promised:
        raise CheckpointError(f"{folder_uri} contradicts its index: {_some(weights.keys() ^ promised)}; copy it again")
    return weights


def read_tensors(uri: str, prefix: str = "") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Read a safetensors file's metadata and the tensors whose names begin with ``prefix``.

    Only the bytes of these tensors are read. The format holds no code, so files from strangers are safe.

    Returns:
        The metadata, and the tensors by name without the prefix.

    Raises:
        NotFoundError: the file does not exist.
        CheckpointError: the file is not in safetensors format.
    """
    try:
        base, header = read_header(uri)
        metadata = header.pop("__metadata__", {})
        wanted = sorted((entry["data_offsets"], name) for name, entry in header.items() if name.startswith(prefix))
        chosen, parts, end = {}, [], 0
        for (start, stop), name in wanted:
            parts.append(storage.read_range(uri, base + start, stop - start))
            start, end = end, end + len(parts[-1])
            chosen[name.removeprefix(prefix)] = {**header[name], "data_offsets": [start, end]}
        # A file of these tensors alone is built in memory, so that the library checks shapes and types.
        head = json.dumps(chosen).encode()
        # The format pads headers to a multiple of 8 bytes, so that tensors are aligned.
        head += b" " * (-len(head) % 8)
        return metadata, load(b"".join([len(head).to_bytes(8, "little"), head, *parts]))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{uri} is no safetensors file ({error}); give the projector.safetensors that pretrain wrote, or a finished model"
        ) from error


def count_parameters(uri: str) -> int:
    """Count the elements of all tensors in a safetensors file. Only the header is read.

    Raises:
        NotFoundError: the file does not exist.
        CheckpointError: the file is not in safetensors format.
    """
    try:
        tensors = {name: entry for name, entry in read_header(uri)[1].items() if name != "__metadata__"}
        return sum(math.prod(entry["shape"]) for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{uri} is no safetensors file ({error}); run the stage that wrote it again") from error


def load_weights(projector: Projector, weights: Mapping[str, torch.Tensor], uri: str) -> None:
    """Copy weights that were read from ``uri`` into a projector, in the projector's dtype.

    Raises:
        CheckpointError: a tensor is missing, unknown or has another shape; the message names the tensor.
    """
    own = projector.state_dict()
    odd = weights.keys() ^ own.keys() or {name for name in own if weights[name].shape != own[name].shape}
    if odd:
        raise CheckpointError(f"{uri} does not fit the projector that its settings make: {_some(odd)}")
    projector.load_state_dict(weights)


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:_NUM_SHOWN])
