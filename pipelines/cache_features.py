"""Stage 0: index every picture once, encode every distinct picture once, publish the features."""

import collections
import hashlib
import logging
import pickle
import sys
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
    DatasetIndex,
    FeatureCache,
    IndexRow,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.manifest import latest_manifest
from meteor.cache.row import FEATURE_SCHEMA
from meteor.config import RunSettings, mathematical_settings, settings_digest
from meteor.data.features import PixelSettings, SlicedImage, encode_sliced, slice_bytes
from meteor.data.roots import resolve_image
from meteor.errors import BadImageError, ImagePathError, NotFoundError, QuarantineLimitError
from meteor.image.decode import decode_image
from pipelines.inputs import (
    SampleSet,
    cache_identity,
    index_uri,
    load_encoder,
    load_sets,
    pixel_settings,
)
from pipelines.runtime import Counter, num_blocks, progress, worker_environment
from pipelines.stage import StageRun, Summary, canonical, stage_main, timed

_LOG = logging.getLogger(__name__)
_DESCRIPTION = """Slice the pictures of all sample sets and cache what the frozen encoder sees. The first pass indexes files
(a later run reads only new and changed ones), the second encodes distinct pictures that the cache does not have yet."""


def run(settings: RunSettings) -> Summary:
    """Index, encode, publish.

    Raises:
        QuarantineLimitError: too many bad pictures, after the good ones were published.
    """
    with timed() as seconds:
        sets = load_sets(settings)
        identity = cache_identity(settings, load_encoder(settings))
        cache_uri = create_cache(settings.cache_root, identity, settings.cache.codec)
        stage = _stage(settings, sets, identity.key)
        index, num_read = update_index(settings, sets)
        rows = _rows_of(index, sets)
        wanted, refused = _to_encode(rows, pixel_settings(settings))
        missing = _missing(settings, cache_uri, wanted)
        _LOG.info("%d distinct pictures, %d of them to encode", len(wanted), len(missing))
        before = stage.finished()
        if before and not missing and not num_read:
            return before
        stage.start(cache=cache_uri, cache_key=identity.key, sample_sets={one.name: one.uri for one in sets})
        with stage.tracked(canonical(mathematical_settings(settings))) as (tracker, run_id, _):
            if missing:
                encode_missing(settings, cache_uri, missing)
            record_quarantine(cache_uri, _new_refusals(cache_uri, refused))
            commit(cache_uri)
            cache = FeatureCache.open(cache_uri)
            bad = refused + [row for row in cache.quarantine() if row.image_key in wanted]
            summary = _summary(cache, index, rows, wanted, bad, num_read, len(missing), seconds())
            tracker.log_metrics(run_id, [{"step": 0, **summary.counts, "seconds": summary.seconds}])
            tracker.log_dataset(
                run_id, name=f"features {identity.key[:12]}", digest=identity.key, source=cache_uri, context="cache"
            )
            _check_share_of_bad(settings, len(rows), bad)
        return stage.finish(summary)


def _missing(settings: RunSettings, cache_uri: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Pictures to encode. Files that an interrupted run finished are adopted first, so they are not encoded again."""
    commit(cache_uri)
    if not latest_manifest(cache_uri):
        return dict(wanted)
    cache = FeatureCache.open(cache_uri)
    done = set(cache.keys_with_attention(settings.vision.attention_layers)) | cache.quarantined().keys()
    return {key: uri for key, uri in wanted.items() if key not in done}


def _summary(
    cache: FeatureCache,
    index: DatasetIndex,
    rows: list[IndexRow],
    wanted: Mapping[str, str],
    bad: list[QuarantineRow],
    num_read: int,
    num_encoded: int,
    seconds: float,
) -> Summary:
    counts = {
        "pictures": len(rows),
        "distinct_pictures": len(wanted),
        "pictures_read": num_read,
        "pictures_encoded": num_encoded,
        "sub_images_cached": cache.num_sub_images,
        "pictures_cached": len(cache),
        "payload_bytes": cache.num_bytes,
        "quarantined": len(bad),
        "shadowed_rows": cache.manifest.num_shadowed,
    }
    results = {"cache": cache.uri, "index": f"{index.uri} version {index.version}"}
    extra = {
        "reasons": dict(collections.Counter(row.reason for row in bad)),
        "cache_key": cache.identity.key,
        "codec": cache.codec,
        "cache_version": cache.version,
        "identity": cache.identity.to_dict(),
    }
    return Summary("cache_features", counts, seconds, results, extra=extra)


def plan(settings: RunSettings) -> str:
    """What `run` would do, from the index as it is; no picture is read."""
    sets = load_sets(settings)
    encoder = load_encoder(settings)
    identity = cache_identity(settings, encoder)
    names = set().union(*(one.image_names for one in sets))
    index = DatasetIndex.latest(index_uri(settings))
    known = {row.name: row for row in index.rows()} if index else {}
    uri = storage.join(settings.cache_root, identity.key, settings.cache.codec)
    cached = set(FeatureCache.open(uri).keys()) if latest_manifest(uri) else set()
    keys = {known[name].image_key for name in names & known.keys() if known[name].status == "ok"}
    lines = [
        "cache_features: plan",
        *(
            f"  {one.name}: {len(one.samples):,} samples, {len(one.image_names):,} pictures, {len(one.problems)} unusable"
            for one in sets
        ),
        f"  pictures named         {len(names):,}",
        f"  not in the index yet   {len(names - known.keys()):,} (will be read)",
        f"  distinct, indexed      {len(keys):,}",
        f"  of these cached        {len(keys & cached):,}",
        f"  cache                  {uri}",
    ]
    return "\n".join(lines)


# ---- first pass: the dataset index


def update_index(settings: RunSettings, sets: list[SampleSet]) -> tuple[DatasetIndex, int]:
    """Publish the index of all pictures; only new and changed files are read.

    Returns:
        The index, and how many files were read.
    """
    places = _places(settings, sets)
    latest = DatasetIndex.latest(index_uri(settings))
    rows: list[IndexRow] = []
    to_read: list[dict[str, str]] = []
    for name, uri in places.items():
        if uri.startswith("outside:"):
            rows.append(IndexRow(name, uri, 0, "", "", 0, 0, "bad", "outside_roots"))
            continue
        try:
            info = storage.stat(uri)
        except NotFoundError:
            rows.append(IndexRow(name, uri, 0, "", "", 0, 0, "bad", "missing"))
            continue
        unchanged = latest.unchanged(info) if latest else None
        if unchanged is None:
            to_read.append({"name": name, "uri": uri})
        else:
            rows.append(unchanged)
    _LOG.info("%d pictures, %d of them new or changed since the last index", len(places), len(to_read))
    rows += read_pictures(to_read, settings.data.max_pixels)
    return DatasetIndex.publish(index_uri(settings), rows), len(to_read)


def read_pictures(places: list[dict[str, str]], max_pixels: int) -> list[IndexRow]:
    """Read, hash and decode pictures on all CPUs of the cluster."""
    if not places:
        return []
    dataset = ray.data.from_items(places, override_num_blocks=num_blocks(len(places), 16)).map(
        _read_picture, fn_kwargs={"max_pixels": max_pixels}
    )
    rows: list[IndexRow] = []
    with progress("pictures indexed", len(places), lambda: len(rows)):
        for row in dataset.iter_rows():
            rows.append(IndexRow(**row))
    return rows


def _read_picture(row: dict[str, str], *, max_pixels: int) -> dict[str, Any]:
    info = storage.stat(row["uri"])
    data = storage.read_bytes(row["uri"])
    fields = {"name": row["name"], "uri": row["uri"], "size_bytes": info.size_bytes, "etag": info.etag}
    fields["image_key"] = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except BadImageError as error:
        return {**fields, "width": 0, "height": 0, "status": "bad", "reason": error.reason}
    return {**fields, "width": image.width, "height": image.height, "status": "ok", "reason": ""}


def _places(settings: RunSettings, sets: list[SampleSet]) -> dict[str, str]:
    """Image name -> URI; a name that leaves its root keeps a marked place, and is never opened."""
    places: dict[str, str] = {}
    for name in sorted(set().union(*(one.image_names for one in sets))):
        try:
            places[name] = resolve_image(name, settings.data.roots)
        except ImagePathError:
            places[name] = f"outside:{name}"
    return places


# ---- second pass: encode what is missing


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


# ---- what comes out


def _rows_of(index: DatasetIndex, sets: list[SampleSet]) -> list[IndexRow]:
    names = set().union(*(one.image_names for one in sets))
    return [row for row in index.rows() if row.name in names]


def _to_encode(rows: Iterable[IndexRow], pixels: PixelSettings) -> tuple[dict[str, str], list[QuarantineRow]]:
    """Image key -> URI of every distinct good picture; and the pictures refused, unreadable or too long."""
    wanted: dict[str, str] = {}
    refused: list[QuarantineRow] = []
    for row in rows:
        if row.status == "bad":
            refused.append(QuarantineRow(row.image_key, row.name, row.reason, f"{row.uri}: {row.reason}"))
            continue
        try:
            pixels.plan(row.width, row.height)
        except BadImageError as error:
            refused.append(QuarantineRow(row.image_key, row.name, error.reason, str(error)))
        else:
            wanted.setdefault(row.image_key, row.uri)
    return wanted, refused


def _new_refusals(cache_uri: str, refused: Iterable[QuarantineRow]) -> list[QuarantineRow]:
    """Those that the cache's quarantine does not hold in the same words yet: a second run changes nothing."""
    known = set(FeatureCache.open(cache_uri).quarantine()) if latest_manifest(cache_uri) else set()
    return [row for row in refused if row not in known]


def _check_share_of_bad(settings: RunSettings, num_pictures: int, bad: list[QuarantineRow]) -> None:
    data = settings.data
    if len(bad) >= data.min_bad_images and len(bad) > data.max_bad_share * num_pictures:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in collections.Counter(row.reason for row in bad).most_common()
        )
        raise QuarantineLimitError(
            f"{len(bad)} of {num_pictures} pictures are bad ({reasons}), for example {bad[0].name or bad[0].image_key}. "
            "The good ones are cached. See `meteor data check`, repair the files and run again, or raise data.max_bad_share"
        )


def find_run(settings: RunSettings) -> StageRun:
    """The folder of this stage for these settings and sample files."""
    return _stage(settings, load_sets(settings), cache_identity(settings, load_encoder(settings)).key)


def _stage(settings: RunSettings, sets: list[SampleSet], cache_key: str) -> StageRun:
    content = {"sets": sorted(one.digest for one in sets), "cache": cache_key, "codec": settings.cache.codec}
    return StageRun(settings, "cache_features", settings_digest(content))


if __name__ == "__main__":
    sys.exit(stage_main("cache_features", _DESCRIPTION, run, plan))
