"""Checkpoint files: fragments of named tensors as safetensors, a set of files per rank, and a manifest written last.

Layout of one checkpoint:
    step_00000040/<attempt>/rank_00000_000.safetensors    tensors "weights/<name>@<offset>", "exp_avg/...", "exp_avg_sq/..."
    step_00000040/<attempt>/rank_00000.json               list of the rank's fragments with crc32, written last by the rank
    step_00000040/manifest.json                           exists only if the checkpoint is complete

An attempt is one start of the workers. Files of a killed attempt are never mixed with files of the next attempt at a step.
"""

import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from meteor import storage
from meteor.checkpoint.header import read_header
from meteor.checksums import read_checked_json, write_checked_json
from meteor.constants import CHECKPOINT_FORMAT_VERSION
from meteor.errors import CheckpointError, DamagedError, NotFoundError

MANIFEST = "manifest.json"
KINDS = ("weights", "exp_avg", "exp_avg_sq")
_FILE_BYTES = 1 << 30
# Elements of a fragment, 64 MiB in fp32. A reader of part of a tensor reads whole fragments to check them, so it reads at
# most this much in vain at either end.
_FRAGMENT_ELEMENTS = 1 << 24
_NUM_THREADS = 4


@dataclass(frozen=True)
class Fragment:
    """Contiguous piece of a flattened fp32 tensor.

    Attributes:
        kind: "weights", "exp_avg" or "exp_avg_sq".
        name: name of the parameter.
        offset: index of the piece's first element in the flattened parameter.
        values: elements of the piece, (n,) float32.
    """

    kind: str
    name: str
    offset: int
    values: torch.Tensor


def checkpoint_uri(root: str, step: int) -> str:
    """Return the folder of a step's checkpoint; names sort in the order of steps."""
    return storage.join(root, f"step_{step:08d}")


def write_fragments(uri: str, rank: int, fragments: Iterable[Fragment], *, attempt: str = "0") -> None:
    """Write this rank's fragments to files of about 1 GiB, so that the whole state is never copied in memory.

    Args:
        uri: folder of the checkpoint.
        rank: rank of this worker.
        fragments: pieces that this rank owns; an iterator is consumed piece by piece.
        attempt: name of this start of the workers.
    """
    folder = storage.join(uri, attempt)
    parts: list[dict[str, Any]] = []
    pending: dict[str, torch.Tensor] = {}
    num_files = pending_bytes = 0

    def flush() -> None:
        nonlocal num_files, pending_bytes
        if pending:
            storage.write_bytes(storage.join(folder, f"rank_{rank:05d}_{num_files:03d}.safetensors"), save(pending))
            num_files += 1
        pending.clear()
        pending_bytes = 0

    for fragment in _divided(fragments):
        values = fragment.values.detach().to("cpu", torch.float32).reshape(-1).contiguous()
        key = f"{fragment.kind}/{fragment.name}@{fragment.offset}"
        parts.append(
            {
                "kind": fragment.kind,
                "name": fragment.name,
                "offset": fragment.offset,
                "num_elements": values.numel(),
                "crc32": zlib.crc32(values.numpy().data),
                "key": key,
                "file": f"{attempt}/rank_{rank:05d}_{num_files:03d}.safetensors",
            }
        )
        pending[key] = values
        pending_bytes += values.numel() * 4
        if pending_bytes >= _FILE_BYTES:
            flush()
    flush()
    write_checked_json(storage.join(folder, f"rank_{rank:05d}.json"), {"fragments": parts})


def _divided(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    for fragment in fragments:
        flat = fragment.values.reshape(-1)
        # An empty tensor gives an empty fragment, so that the manifest lists it.
        for start in range(0, max(flat.numel(), 1), _FRAGMENT_ELEMENTS):
            values = flat[start : start + _FRAGMENT_ELEMENTS]
            yield Fragment(fragment.kind, fragment.name, fragment.offset + start, values)


def num_written(uri: str, *, attempt: str, world_size: int) -> int:
    """Count the ranks of an attempt that have written all their fragments."""
    return sum(storage.exists(_part(uri, attempt, rank)) for rank in range(world_size))


def _part(uri: str, attempt: str, rank: int) -> str:
    return storage.join(uri, attempt, f"rank_{rank:05d}.json")


def publish(
    uri: str, *, world_size: int, shapes: dict[str, list[int]], state: dict[str, Any], attempt: str = "0"
) -> None:
    """Write the manifest, which makes the checkpoint complete, after every rank has written its fragments.

    Args:
        uri: folder of the checkpoint.
        world_size: number of ranks that wrote fragments.
        shapes: name -> shape of every trained parameter.
        state: order state and fingerprints as JSON values.
        attempt: name of the workers' start whose files the manifest lists.

    Raises:
        CheckpointError: the fragments do not cover a parameter.
    """
    parts = [read_checked_json(_part(uri, attempt, rank)) for rank in range(world_size)]
    fragments = [fragment for part in parts for fragment in part["fragments"]]
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for part in fragments:
        spans.setdefault((part["kind"], part["name"]), []).append((part["offset"], part["num_elements"]))
    for name, shape in shapes.items():
        for kind in KINDS:
            # A rank that wrote too little would otherwise be noticed only when the checkpoint is needed.
            covered = _num_covered(spans.get((kind, name), []))
            if covered != torch.Size(shape).numel():
                raise CheckpointError(f"{uri}: {kind} of {name} is whole up to element {covered}, its shape is {shape}")
    manifest = {
        "format": CHECKPOINT_FORMAT_VERSION,
        "world_size": world_size,
        "attempt": attempt,
        "shapes": shapes,
        "fragments": fragments,
        "state": state,
    }
    write_checked_json(storage.join(uri, MANIFEST), manifest)


def _num_covered(spans: list[tuple[int, int]]) -> int:
    """Count the elements that (offset, length) spans cover from 0 up to the first gap or overlap."""
    end = 0
    for offset, num_elements in sorted(spans):
        if offset != end:
            break
        end += num_elements
    return end


class Checkpoint:
    """A complete checkpoint whose tensors are read by range, and only on request.

    Args:
        uri: folder of the checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint at the URI, or its manifest is damaged.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            manifest = read_checked_json(storage.join(uri, MANIFEST))
        except NotFoundError as error:
            raise CheckpointError(f"{uri} is not a complete checkpoint: it has no {MANIFEST}") from error
        except DamagedError as error:
            raise CheckpointError(f"{error}. Use an older checkpoint") from error
        if manifest["format"] > CHECKPOINT_FORMAT_VERSION:
            raise CheckpointError(
                f"{uri} has format {manifest['format']}; this version reads {CHECKPOINT_FORMAT_VERSION}"
            )
        self.attempt: str = manifest["attempt"]
        self.shapes: dict[str, list[int]] = manifest["shapes"]
        self.state: dict[str, Any] = manifest["state"]
        self._fragments: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for part in manifest["fragments"]:
            self._fragments.setdefault((part["kind"], part["name"]), []).append(part)
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def read(self, kind: str, name: str) -> torch.Tensor:
        """Read a whole tensor in its shape, float32.

        Raises:
            CheckpointError: the checkpoint does not have the tensor, or a checksum does not match.
        """
        return self.read_range(kind, name, 0, torch.Size(self.shapes.get(name, ())).numel()).view(self.shapes[name])

    def read_range(self, kind: str, name: str, start: int, num_elements: int) -> torch.Tensor:
        """Read elements of a flattened tensor from ``start``, (num_elements,) float32, and no fragment without them.

        Raises:
            CheckpointError: the checkpoint does not have the tensor, or a checksum does not match.
        """
        if (kind, name) not in self._fragments:
            raise CheckpointError(f"{self.uri} has no {kind} of {name}")
        end, values = start + num_elements, torch.empty(num_elements)
        for part in self._fragments[kind, name]:
            first, last = max(start, part["offset"]), min(end, part["offset"] + part["num_elements"])
            if first < last:
                inside = slice(first - part["offset"], last - part["offset"])
                values[first - start : last - start] = self._read_fragment(part)[inside]
        return values

    def verify(self, share: int = 0, num_shares: int = 1) -> None:
        """Read every ``num_shares``-th fragment from the one numbered ``share``, and compare its checksum.

        Raises:
            CheckpointError: a fragment is missing or damaged.
        """
        parts = [part for parts in self._fragments.values() for part in parts]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for _ in pool.map(self._read_fragment, parts[share::num_shares]):
                pass

    def _read_fragment(self, part: dict[str, Any]) -> torch.Tensor:
        uri = storage.join_below(self.uri, part["file"])
        try:
            base, header = self._header(uri)
            start, end = header[part["key"]]["data_offsets"]
            # torch warns about buffers that are not writable, so the bytes are copied into a bytearray.
            data = bytearray(storage.read_range(uri, base + start, end - start)) if end > start else bytearray()
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{uri}: its header is damaged ({error}); use an older checkpoint") from error
        except (NotFoundError, DamagedError) as error:
            raise CheckpointError(f"{error}. Use an older checkpoint") from error
        if zlib.crc32(data) != part["crc32"]:
            raise CheckpointError(
                f"{uri}: {part['key']} is damaged (its crc32 does not match); use an older checkpoint"
            )
        return torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)

    def _header(self, uri: str) -> tuple[int, dict[str, Any]]:
        """Return the position of the tensors' first byte, and the header, of a safetensors file."""
        if uri not in self._headers:
            self._headers[uri] = read_header(uri)
        return self._headers[uri]
