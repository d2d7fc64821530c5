"""Second pass of cache_features: slice on CPUs, encode in actors, write feature files, as a stream."""

import hashlib
import logging
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.data.block import Block
from ray.data.datasource import Datasink

from meteor import storage
from meteor.cache import (
    QuarantineRow,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.row import FEATURE_SCHEMA
from meteor.config import RunSettings
from meteor.data.features import PixelSettings, SlicedImage, encode_sliced, slice_bytes
from meteor.errors import BadImageError, NotFoundError
from pipelines.inputs import (
    load_encoder,
    pixel_settings,
)
from pipelines.runtime import Counter, num_blocks, progress, worker_environment

_LOG = logging.getLogger(__name__)


def encode_missing(settings: RunSettings, cache_uri: str, missing: Mapping[str, str]) -> None:
    """Read and slice on CPUs, encode in actors, write feature files: separate operators that stream.

    Args:
        settings: of the run.
        cache_uri: a cache that exists.
        missing: image key -> where the picture is.
    """
    runtime = settings.runtime
    items = [{"image_key": key, "uri": uri} for key, uri in sorted(missing.items())]
    counter = Counter.remote()
    with progress("pictures encoded", len(items), lambda: ray.get(counter.count.remote())):
        ray.data.from_items(items, override_num_blocks=num_blocks(len(items), runtime.encoder_batch_size)).map_batches(
            slice_batch,
            batch_size=runtime.encoder_batch_size,
            batch_format="pyarrow",
            fn_kwargs={"pixels": pixel_settings(settings)},
        ).map_batches(
            Encoder,
            fn_constructor_kwargs={"settings": settings, "counter": counter},
            batch_size=runtime.encoder_batch_size,
            batch_format="pyarrow",
            num_cpus=runtime.cpus_per_encoder,
            num_gpus=runtime.gpus_per_encoder or None,
            compute=ActorPoolStrategy(size=runtime.num_encoders),
            runtime_env={"env_vars": worker_environment(runtime.gpus_per_encoder)},
        ).write_datasink(FeatureSink(cache_uri, settings.cache.rows_per_file))


def slice_batch(batch: pa.Table, pixels: PixelSettings) -> pa.Table:
    """Read and slice pictures; one that cannot be becomes a row with a reason."""
    rows = []
    for image_key, uri in zip(batch["image_key"].to_pylist(), batch["uri"].to_pylist(), strict=True):
        row = {"image_key": image_key, "uri": uri, "sliced": b"", "reason": "", "message": ""}
        try:
            # Pickled between operators of this job only; nothing pickled is ever stored.
            row["sliced"] = pickle.dumps(slice_bytes(_read_unchanged(uri, image_key), image_key, pixels))
        except BadImageError as error:
            row |= {"reason": error.reason, "message": str(error)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SLICED_SCHEMA)


def _read_unchanged(uri: str, image_key: str) -> bytes:
    try:
        data = storage.read_bytes(uri)
    except NotFoundError as error:
        raise BadImageError("missing", f"{uri} was indexed and is gone") from error
    if hashlib.sha256(data).hexdigest() != image_key:
        raise BadImageError("changed", f"{uri} has changed since it was indexed; run cache_features again")
    return data


class Encoder:
    """Actor: holds the frozen tower, turns sliced pictures into feature rows."""

    def __init__(self, settings: RunSettings, counter: "ray.actor.ActorHandle") -> None:
        device = "cuda" if settings.runtime.gpus_per_encoder else "cpu"
        if device == "cpu":
            torch.set_num_threads(max(int(settings.runtime.cpus_per_encoder), 1))
        self._encoder = load_encoder(settings, device=device)
        self._codec = get_codec(settings.cache.codec)
        self._counter = counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        sliced = [pickle.loads(data) for data in batch["sliced"].to_pylist() if data]
        rows = [
            _failed(row) for row in batch.select(["image_key", "uri", "reason", "message"]).to_pylist() if row["reason"]
        ]
        rows += self._encode(sliced)
        ray.get(self._counter.add.remote(len(rows)))
        return pa.concat_tables(rows)

    def _encode(self, sliced: list[SlicedImage]) -> list[pa.Table]:
        try:
            return [_good(encode_row(image, self._codec)) for image in encode_sliced(sliced, self._encoder)]
        except BadImageError as error:
            if len(sliced) == 1:
                return [_failed({"image_key": sliced[0].image_key, "reason": error.reason, "message": str(error)})]
        return [row for image in sliced for row in self._encode([image])]


class FeatureSink(Datasink[int]):
    """Writes feature files with their ledger records; a crash loses at most the files that were open."""

    def __init__(self, cache_uri: str, rows_per_file: int) -> None:
        self._cache_uri, self._rows_per_file = cache_uri, rows_per_file

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: Any) -> int:
        """One data file; returns how many pictures it holds."""
        table = pa.concat_tables([block for block in blocks if block.num_rows])
        good = table.filter(pc.equal(table["reason"], ""))
        bad = table.filter(pc.not_equal(table["reason"], ""))
        record_quarantine(
            self._cache_uri,
            [
                QuarantineRow(row["image_key"], "", row["reason"], row["message"])
                for row in bad.select(_REPORT).to_pylist()
            ],
        )
        if good.num_rows:
            write_feature_file(self._cache_uri, [good.select(FEATURE_SCHEMA.names).cast(FEATURE_SCHEMA)])
        return good.num_rows


_SLICED_SCHEMA = pa.schema(
    [
        ("image_key", pa.string()),
        ("uri", pa.string()),
        ("sliced", pa.binary()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
_REPORT = ["image_key", "reason", "message"]
_ROW_SCHEMA = pa.schema([*FEATURE_SCHEMA, pa.field("reason", pa.string()), pa.field("message", pa.string())])


def _good(row: pa.RecordBatch) -> pa.Table:
    table = pa.Table.from_batches([row])
    empty = pa.array([""])
    return pa.table([*table.columns, empty, empty], schema=_ROW_SCHEMA)


def _failed(row: Mapping[str, Any]) -> pa.Table:
    blank: dict[str, Any] = {
        field.name: "" if pa.types.is_string(field.type) else b"" if pa.types.is_binary(field.type) else 0
        for field in _ROW_SCHEMA
    }
    blank |= {"patch_grids": [], "attention_layers": [], **{name: row[name] for name in _REPORT}}
    return pa.Table.from_pylist([blank], schema=_ROW_SCHEMA)
