"""Conversion between an image's features in memory and a row of a feature file.

Letters: P patches of a sub-image, C vision width, A attention layers, S sub-images of the image.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from meteor.cache.codec import Codec, tensor_over
from meteor.cache.quality import QUALITY_COLUMNS
from meteor.errors import CacheError, CorruptPayloadError
from meteor.features import ImageFeatures


def _list_of_int32(name: str) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False)


# Columns that describe a row's image; feature files and the key index share them.
IMAGE_FIELDS = (
    pa.field("image_key", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    # Both are 0 if the image is not sliced.
    pa.field("grid_columns", pa.int32(), nullable=False),
    pa.field("grid_rows", pa.int32(), nullable=False),
    # Rows and columns of the global view, then of each slice.
    _list_of_int32("patch_grids"),
    _list_of_int32("attention_layers"),
    # The checksum covers the bytes of features, cls_attention and cls, in this order.
    pa.field("crc32", pa.uint32(), nullable=False),
    # Errors of the codec (`quality.Quality`); null in files of schema version 1.
    *(pa.field(name, pa.float32()) for name in QUALITY_COLUMNS),
)
_READ_FIELDS = [field.name for field in IMAGE_FIELDS if not field.nullable]
# These columns come last and in this order, so that a single byte range of a file contains all three.
PAYLOAD_COLUMNS = ("features", "cls_attention", "cls")
FEATURE_SCHEMA = pa.schema([*IMAGE_FIELDS, *(pa.field(name, pa.binary(), nullable=False) for name in PAYLOAD_COLUMNS)])


def read_row(rows: pa.Table | pa.RecordBatch, position: int, codec: Codec) -> ImageFeatures:
    """Decode the image in a row of a table with `FEATURE_SCHEMA`.

    Raises:
        CorruptPayloadError: the row's checksum does not match.
    """
    # Readers of features do not need the errors that were measured when they were stored.
    fields = {name: rows[name][position].as_py() for name in _READ_FIELDS}
    features, cls_attention, cls = (bytearray(rows[name][position].as_buffer()) for name in PAYLOAD_COLUMNS)
    if payload_crc32(features, cls_attention, cls) != fields["crc32"]:
        raise CorruptPayloadError(f"image {fields['image_key']}: the payload's checksum does not match")
    return decode_payload(fields, features, cls_attention, cls, codec)


def decode_payload(
    fields: Mapping[str, Any],
    features: bytearray | memoryview,
    cls_attention: bytearray | memoryview,
    cls: bytearray | memoryview,
    codec: Codec,
) -> ImageFeatures:
    """Decode an image from a row's fields (`IMAGE_FIELDS`) and payloads, whose memory the tensors share.

    Raises:
        CacheError: the sizes of the payloads contradict the fields or the codec.
    """
    layout = payload_layout(fields, (len(features), len(cls_attention), len(cls)), codec)
    return ImageFeatures(
        image_key=fields["image_key"],
        width=fields["width"],
        height=fields["height"],
        grid=(fields["grid_columns"], fields["grid_rows"]) if fields["grid_columns"] else None,
        patch_grids=layout.patch_grids,
        attention_layers=tuple(fields["attention_layers"]),
        features=[
            codec.decode(part, count, layout.vision_width)
            for part, count in zip(_split(features, layout.feature_sizes), layout.num_patches, strict=True)
        ],
        cls_attention=[
            tensor_over(part, torch.float32, (len(fields["attention_layers"]), count))
            for part, count in zip(_split(cls_attention, layout.attention_sizes), layout.num_patches, strict=True)
        ],
        cls=tensor_over(cls, torch.float32, (len(layout.patch_grids), layout.vision_width)),
    )


@dataclass(frozen=True)
class PayloadLayout:
    """Division of a row's payloads among sub-images.

    Attributes:
        patch_grids: (rows, columns) of each sub-image.
        num_patches: number of patches of each sub-image.
        vision_width: width C of the features.
        feature_sizes: bytes of each sub-image's features.
        attention_sizes: bytes of each sub-image's attention.
    """

    patch_grids: tuple[tuple[int, int], ...]
    num_patches: list[int]
    vision_width: int
    feature_sizes: list[int]
    attention_sizes: list[int]


def payload_layout(fields: Mapping[str, Any], sizes_bytes: tuple[int, int, int], codec: Codec) -> PayloadLayout:
    """Compute the layout of payloads from their sizes in the order of `PAYLOAD_COLUMNS`.

    Raises:
        CacheError: the sizes contradict the fields or the codec.
    """
    sides = fields["patch_grids"]
    patch_grids = tuple(zip(sides[::2], sides[1::2], strict=True))
    num_patches = [rows * columns for rows, columns in patch_grids]
    # The class tokens, one float32 vector per sub-image, give the width: it is stored nowhere else in the row.
    vision_width = sizes_bytes[2] // 4 // max(len(patch_grids), 1)
    feature_sizes = [codec.size_bytes(count, vision_width) for count in num_patches]
    attention_sizes = [4 * len(fields["attention_layers"]) * count for count in num_patches]
    wanted = (sum(feature_sizes), sum(attention_sizes), 4 * vision_width * len(patch_grids))
    if wanted != sizes_bytes:
        raise CacheError(
            f"image {fields['image_key']}: with patch grids {list(patch_grids)} and codec {codec.name} the payloads "
            f"{list(PAYLOAD_COLUMNS)} take {list(wanted)} bytes, found {list(sizes_bytes)}"
        )
    return PayloadLayout(patch_grids, num_patches, vision_width, feature_sizes, attention_sizes)


def payload_crc32(*payloads: bytes | bytearray | memoryview) -> int:
    """Compute the crc32 over the concatenated payloads."""
    checksum = 0
    for payload in payloads:
        checksum = zlib.crc32(payload, checksum)
    return checksum


def _split(payload: bytearray | memoryview, sizes: Sequence[int]) -> list[memoryview]:
    view, parts, start = memoryview(payload), [], 0
    for size in sizes:
        parts.append(view[start : start + size])
        start += size
    return parts
