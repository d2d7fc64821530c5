"""Second operator of the encoding pass: actors that encode sliced images and write feature files."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch

from meteor.assembly import load_encoder, pixel_settings
from meteor.cache import encode_row, open_codec, write_feature_file
from meteor.cache.row import PAYLOAD_COLUMNS
from meteor.config import RunSettings
from meteor.errors import BadImageError
from meteor.features import ImageFeatures
from meteor.image.pixels import PixelSettings, SlicedImage
from meteor.vision.encode_images import encode_each, load_pixels
from pipelines.ray_parts.logs import configure_worker_logging

# Files are small enough to be held a few times in memory, and to be sent again if an upload fails.
MAX_FILE_BYTES = 128 << 20
OUTCOME_SCHEMA = pa.schema(
    [
        ("image_key", pa.string()),
        # Empty when the image is in the cache.
        ("reason", pa.string()),
        ("message", pa.string()),
        ("num_sub_images", pa.int32()),
        ("payload_bytes", pa.int64()),
        # The image's share of the seconds that its batch took on the device.
        ("device_s", pa.float64()),
    ]
)


class DeviceEncoder:
    """Frozen encoder on its device, for several threads: one encodes while the others load pixels."""

    def __init__(self, settings: RunSettings) -> None:
        runtime = settings.runtime
        self._num_threads = max(int(runtime.cpus_per_encoder), 1)
        device = "cuda" if runtime.gpus_per_encoder else "cpu"
        self._encoder = load_encoder(settings, device=device)
        self._encoder.max_tokens = runtime.encoder_max_tokens
        self._lock = threading.Lock()

    def encode(self, images: Sequence[SlicedImage]) -> tuple[list[ImageFeatures | BadImageError], float]:
        """Encode images as `encode_each` does; return also the seconds in which the device was busy."""
        if self._encoder.device.type == "cpu":
            torch.set_num_threads(self._num_threads)  # the setting belongs to the thread
        pixels = load_pixels(images, self._encoder)
        with self._lock:
            started = time.perf_counter()
            encoded = encode_each(images, self._encoder, pixels)
            if self._encoder.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            return encoded, time.perf_counter() - started

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block's device work in a stream of its own, so that it does not wait for another thread's batch."""
        if self._encoder.device.type == "cpu":
            yield
            return
        stream = torch.cuda.Stream(self._encoder.device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


class Encoder:
    """Actor that encodes batches of sliced images and writes them, so that features never travel between processes.

    Several calls run at once: one uses the device, while the others run the codec or write. A call returns its rows after the
    files and their ledger records are written.
    """

    def __init__(self, settings: RunSettings, cache_uri: str) -> None:
        configure_worker_logging(variant=settings.name, stage="cache_features")
        self._device = DeviceEncoder(settings)
        self._pixels = pixel_settings(settings)
        self._cache_uri = cache_uri
        self._codec = open_codec(cache_uri)

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes = [_outcome(row) for row in batch.drop_columns("pixels").to_pylist() if row["reason"]]
        images = list(unpack_sliced(batch, self._pixels))
        if images:
            encoded, device_s = self._device.encode(images)
            rows: list[pa.RecordBatch] = []
            with self._device.beside():
                for image, features in zip(images, encoded, strict=True):
                    outcome = _outcome({"image_key": image.image_key, "device_s": device_s / len(images)})
                    try:
                        rows.append(self._encode_row(features))
                    except BadImageError as error:
                        outcome |= {"reason": error.reason, "message": str(error)}
                    else:
                        outcome |= {"num_sub_images": len(image.sub_images), "payload_bytes": _payload_bytes(rows[-1])}
                    outcomes.append(outcome)
            del encoded
            for part in cut_by_size(rows, [_payload_bytes(row) for row in rows], MAX_FILE_BYTES):
                write_feature_file(self._cache_uri, part, self._codec)
        return pa.Table.from_pylist(outcomes, schema=OUTCOME_SCHEMA)

    def _encode_row(self, features: ImageFeatures | BadImageError) -> pa.RecordBatch:
        if isinstance(features, BadImageError):
            raise features
        return encode_row(features, self._codec)


def unpack_sliced(batch: pa.Table, pixels: PixelSettings) -> Iterator[SlicedImage]:
    """Yield the good images of a batch from `slice_batch`; sub-images share the memory of the batch."""
    columns = [batch[name].to_pylist() for name in ("image_key", "width", "height", "reason")]
    for i, (image_key, width, height, reason) in enumerate(zip(*columns, strict=True)):
        if not reason:
            yield SlicedImage.from_bytes(image_key, width, height, batch["pixels"][i].as_buffer(), pixels)


def cut_by_size(
    rows: Sequence[pa.RecordBatch], sizes_bytes: Sequence[int], max_bytes: int
) -> list[list[pa.RecordBatch]]:
    """Cut rows into parts of about equal size; a part has at most ``max_bytes`` unless a single row has more."""
    num_parts = max(1, -(-sum(sizes_bytes) // max_bytes))
    target = sum(sizes_bytes) / num_parts
    parts: list[list[pa.RecordBatch]] = []
    held = 0
    for row, size in zip(rows, sizes_bytes, strict=True):
        if not parts or held >= target or held + size > max_bytes:
            parts.append([])
            held = 0
        parts[-1].append(row)
        held += size
    return parts


def _payload_bytes(row: pa.RecordBatch) -> int:
    return sum(len(row[name][0].as_buffer()) for name in PAYLOAD_COLUMNS)


def _outcome(fields: Mapping[str, Any]) -> dict[str, Any]:
    blank = {"reason": "", "message": "", "num_sub_images": 0, "payload_bytes": 0, "device_s": 0.0}
    return {**blank, **{name: value for name, value in fields.items() if name in OUTCOME_SCHEMA.names}}
