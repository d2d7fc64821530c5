"""Second pass of cache_features: a stream that slices on CPUs, encodes and writes in actors, and publishes as it runs."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from meteor.assembly import pixel_settings
from meteor.cache import IndexRow, QuarantineRow, commit, record_quarantine
from meteor.config import RunSettings
from meteor.planning.workers import encoding_request
from pipelines.ray_parts.encoder import Encoder
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.meter import EncodingMeter
from pipelines.ray_parts.resources import wait_for_nodes
from pipelines.ray_parts.runtime import progress, worker_environment
from pipelines.ray_parts.slicing import slice_batch

# Ray repeats a batch when its actor dies; without a limit, a batch that kills its actor would be repeated for ever. If a whole
# node dies, Ray needs some 20 s to notice. It waits 0.1 s before the second try, then twice as long each time, up to 5 s, so
# that 15 tries cover about a minute.
_MAX_TASK_RETRIES = 15


def encode_missing(
    settings: RunSettings,
    cache_uri: str,
    missing: Mapping[str, IndexRow],
    live: LiveMetrics,
    check_claim: Callable[[], None],
) -> EncodingMeter:
    """Encode images into a cache; commit them regularly and at the end, even if the pass fails.

    Args:
        settings: settings of the run.
        cache_uri: URI of a cache that exists.
        missing: image key -> row in the index, for the images to encode.
        live: metrics that count images as they are encoded.
        check_claim: function that raises an error if a newer start of the stage has taken over.

    Returns:
        Counts and rates of the pass.
    """
    meter = EncodingMeter(settings.runtime.num_encoders)
    bad: list[QuarantineRow] = []
    committed_at = time.monotonic()
    try:
        with progress("images encoded:", len(missing), lambda: meter.num_images, detail=meter.detail):
            for outcomes in _stream(settings, cache_uri, missing):
                check_claim()
                meter.add(outcomes)
                live.encoded(outcomes)
                bad += [_quarantine_row(row, missing[row["image_key"]]) for row in outcomes if row["reason"]]
                if time.monotonic() - committed_at >= settings.cache.commit_every_s:
                    _publish(cache_uri, bad)
                    committed_at = time.monotonic()
    finally:
        _publish(cache_uri, bad)
    return meter


def _stream(settings: RunSettings, cache_uri: str, missing: Mapping[str, IndexRow]) -> Iterator[list[dict[str, Any]]]:
    """Yield the outcomes of images, batch by batch (`OUTCOME_SCHEMA`)."""
    # In the order of URIs, because images inside a Parquet file are read fast in the order of the file alone.
    keys = sorted(missing, key=lambda key: (missing[key].uri, key))
    items = [{"image_key": key, "uri": missing[key].uri} for key in keys]
    # A block becomes a batch of the encoder and then a feature file; Ray splits blocks with more than 128 MB of pixels.
    num_blocks = -(-len(items) // settings.cache.rows_per_file)
    sliced = ray.data.from_items(items, override_num_blocks=num_blocks).map_batches(
        slice_batch, batch_size=None, batch_format="pyarrow", fn_kwargs={"pixels": pixel_settings(settings)}
    )
    outcomes = encoded(settings, cache_uri, sliced)
    for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield batch.to_pylist()


def encoded(settings: RunSettings, cache_uri: str, sliced: Dataset) -> Dataset:
    """Send sliced images through the encoder actors; the dataset has the columns of `OUTCOME_SCHEMA`."""
    runtime = settings.runtime
    wait_for_nodes(encoding_request(runtime), runtime, at_least=1)
    with warnings.catch_warnings():
        # Ray Data has no other way to limit retries, although it deprecates this one.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return sliced.map_batches(
            Encoder,
            fn_constructor_kwargs={"settings": settings, "cache_uri": cache_uri},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=runtime.cpus_per_encoder,
            num_gpus=runtime.gpus_per_encoder or None,
            compute=ActorPoolStrategy(
                size=runtime.num_encoders,
                max_concurrent_calls_per_actor=runtime.batches_per_encoder,
                # One more sliced batch waits at the actor, so that the device never waits for Ray to send one.
                max_tasks_in_flight_per_actor=runtime.batches_per_encoder + 1,
                enable_true_multi_threading=True,
            ),
            runtime_env={"env_vars": worker_environment(runtime.gpus_per_encoder)},
            max_task_retries=_MAX_TASK_RETRIES,
        )


def _publish(cache_uri: str, bad: list[QuarantineRow]) -> None:
    record_quarantine(cache_uri, bad)
    bad.clear()
    commit(cache_uri)


def _quarantine_row(outcome: Mapping[str, Any], row: IndexRow) -> QuarantineRow:
    return QuarantineRow(row.image_key, row.name, outcome["reason"], outcome["message"], row.uri, row.size_bytes)
