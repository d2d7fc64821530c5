"""Packing of an image into a row of a feature file, with its checksum and the measured loss of the codec.

Letters: P patches of a sub-image, C vision width, A attention layers.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from meteor.cache.codec import Codec, check_finite
from meteor.cache.quality import measure_differences
from meteor.cache.row import FEATURE_SCHEMA, IMAGE_FIELDS, PAYLOAD_COLUMNS, payload_crc32
from meteor.features import ImageFeatures


@torch.no_grad()
def encode_row(image: ImageFeatures, codec: Codec) -> pa.RecordBatch:
    """Encode the image as a row of `FEATURE_SCHEMA`, including the codec's error.

    Packing and measuring run on the features' device; packed bytes are copied once, into the row.

    Raises:
        BadImageError: a value is not finite, or too large for the codec.
    """
    packed, parts = _pack(image.features, codec)
    attention = torch.cat([part_AP.float().flatten() for part_AP in image.cls_attention])
    read_attention = _split_like(attention, image.cls_attention)
    # Lazily, so that only one unpacked sub-image is in memory at a time.
    read_features = map(codec.unpack, parts)
    differences = measure_differences(image.features, read_features, image.cls_attention, read_attention)
    if not differences.is_finite:
        for part_PC in [*image.features, *map(codec.unpack, parts)]:
            check_finite("features", part_PC)
    # `cat` copies the class tokens, so that the row does not change with the caller's memory.
    payloads = (packed.cpu(), attention.cpu(), torch.cat([image.cls.float().flatten()]).cpu())
    for name, payload in zip(PAYLOAD_COLUMNS[1:], payloads[1:], strict=True):
        check_finite(name, payload)
    columns, rows = image.grid or (0, 0)
    buffers = [pa.py_buffer(payload.view(torch.uint8).numpy()) for payload in payloads]
    fields = {
        "image_key": image.image_key,
        "width": image.width,
        "height": image.height,
        "grid_columns": columns,
        "grid_rows": rows,
        "patch_grids": [side for patch_grid in image.patch_grids for side in patch_grid],
        "attention_layers": list(image.attention_layers),
        "crc32": payload_crc32(*(memoryview(buffer) for buffer in buffers)),
        **asdict(differences.quality()),
    }
    values = [pa.array([fields[field.name]], field.type) for field in IMAGE_FIELDS]
    schema = FEATURE_SCHEMA.with_metadata(codec_metadata(codec))
    return pa.RecordBatch.from_arrays([*values, *map(_binary, buffers)], schema=schema)


def codec_metadata(codec: Codec) -> dict[str, str]:
    """Return the metadata of rows and data files: the codec, and the calibration's digest if the codec has one."""
    calibration = {"calibration": codec.calibration_digest} if codec.calibration_digest else {}
    return {"codec": codec.name, **calibration}


def _pack(features: Sequence[torch.Tensor], codec: Codec) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pack all sub-images into a single tensor, and return it with a view for each sub-image."""
    sizes = [codec.size_bytes(*feature_PC.shape) for feature_PC in features]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=features[0].device)
    parts = _split_like(packed.view(codec.dtype), features)
    for feature_PC, part_PC in zip(features, parts, strict=True):
        codec.pack(feature_PC, part_PC)
    return packed, parts


def _split_like(flat: torch.Tensor, shapes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([tensor.numel() for tensor in shapes])
    return [part.view(tensor.shape) for part, tensor in zip(parts, shapes, strict=True)]


def _binary(buffer: pa.Buffer) -> pa.Array:
    """Make an array whose only value is the buffer, without a copy."""
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, buffer])
