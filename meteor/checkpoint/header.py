"""The header of a safetensors file, read by range: where each tensor's bytes are, without reading them."""

import json
from typing import Any

from meteor import storage

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def read_header(uri: str) -> tuple[int, dict[str, Any]]:
    """Read where the tensors begin, and what is known of each.

    Returns:
        The first byte of the tensors; and by name ``dtype``, ``shape`` and ``data_offsets`` from that byte on, with the
        file's own texts under ``__metadata__``.

    Raises:
        NotFoundError: there is no such file.
        StorageError: the file ends inside its header.
        ValueError: the header is none.
    """
    size = int.from_bytes(storage.read_range(uri, 0, 8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"its header would have {size} bytes")
    try:
        return 8 + size, json.loads(storage.read_range(uri, 8, size))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
