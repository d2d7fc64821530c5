"""Stage 0, cache_features: index every image once, encode every distinct image once, publish the features."""

import collections
import logging
import sys
from collections.abc import Iterable, Mapping

from meteor.assembly import Inputs, pixel_settings
from meteor.assembly.sample_sets import as_samples, names_of_images
from meteor.cache import (
    DatasetIndex,
    FeatureCache,
    IndexRow,
    QuarantineRow,
    commit,
    create_cache,
    record_quarantine,
    summarise_errors,
)
from meteor.cache.manifest import latest_manifest, read_keys
from meteor.cache.quarantine import retryable
from meteor.config import RunSettings, mathematical_settings
from meteor.data.sample_sets import SampleSet
from meteor.errors import BadImageError, QuarantineLimitError
from meteor.evaluation.question_images import is_written, write_images
from meteor.evaluation.question_set import QuestionSet
from meteor.image.pixels import PixelSettings
from meteor.planning.survey import estimate_cache
from meteor.runs.folder import StageFolder, Summary
from meteor.runs.identity import identify
from pipelines.command import stage_main, timed
from pipelines.ray_parts.calibration import calibrate_cache
from pipelines.ray_parts.encoding import encode_missing
from pipelines.ray_parts.indexing import update_index
from pipelines.ray_parts.live_metrics import LiveMetrics
from pipelines.ray_parts.runtime import job_id, progress
from pipelines.ray_parts.tracked import reuse, tracked

_LOG = logging.getLogger(__name__)
_CODEC_ERRORS = ("mean_relative_error", "max_relative_error", "min_cosine", "mean_top_k_agreement")
_DESCRIPTION = """Slice the images of all sample sets and cache their features from the frozen encoder. The first pass indexes
image files; a later run reads only new and changed files. The second pass encodes the distinct images that the cache lacks."""


def run(inputs: Inputs) -> Summary:
    """Index, encode, publish.

    Raises:
        QuarantineLimitError: too many images are bad; it is raised after the good images are published.
    """
    with timed() as seconds:
        settings, sets = inputs.settings, inputs.all_sets()
        cache_identity = inputs.cache_identity()
        cache_uri = create_cache(settings.cache_root, cache_identity, settings.cache.codec)
        folder = StageFolder(settings.output, identify(inputs, "cache_features"))
        _write_question_images(settings, inputs.question_sets())
        index, num_read = update_index(settings, sets, inputs.image_roots())
        rows = _rows_of(index, sets)
        wanted, refused = _to_encode(rows, pixel_settings(settings))
        missing = _missing(settings, cache_uri, wanted)
        _LOG.info("%d distinct images, %d of them to encode", len(wanted), len(missing))
        before = folder.finished()
        if before and not missing and not num_read:
            return reuse(settings, folder, before)
        sources = {file.name: file.uri for file in sets}
        folder.start(settings, job=job_id(), cache=cache_uri, cache_key=cache_identity.key, sample_sets=sources)
        with tracked(settings, folder, mathematical_settings(settings)) as log:
            live = LiveMetrics(settings.name, "cache_features", folder.digest)
            encoding: dict[str, float] = {}
            if missing:
                calibrate_cache(settings, cache_uri, wanted)
                encoding = encode_missing(settings, cache_uri, missing, live, folder.check_claim).counts()
            new_refusals = _new_refusals(cache_uri, refused)
            record_quarantine(cache_uri, new_refusals)
            live.quarantined([row.reason for row in new_refusals])
            commit(cache_uri, even_empty=True)
            inputs.refresh()
            cache = FeatureCache.open(cache_uri)
            bad = refused + [row for row in cache.quarantine() if row.image_key in wanted]
            summary = _summary(cache, index, rows, wanted, bad, num_read, len(missing), encoding, seconds())
            log.metrics({**summary.counts, "seconds": summary.seconds})
            log.cache(cache, context="cache")
            _check_share_of_bad(settings, len(rows), bad)
        return folder.finish(summary)


def _write_question_images(settings: RunSettings, sets: Iterable[QuestionSet]) -> None:
    """Write images as files if they come inside a benchmark's own files, or must be resized."""
    for questions in sets:
        if not is_written(questions):
            _write_images_of(settings, questions)


def _write_images_of(settings: RunSettings, questions: QuestionSet) -> None:
    num_written, total = 0, len(as_samples(questions).image_names)

    def count(number: int) -> None:
        nonlocal num_written
        num_written = number

    with progress(f"{questions.name}: images written:", total, lambda: num_written):
        write_images(questions, settings.data.roots, max_pixels=settings.data.max_pixels, on_written=count)


def _missing(settings: RunSettings, cache_uri: str, wanted: Mapping[str, IndexRow]) -> dict[str, IndexRow]:
    """Return the images to encode."""
    # Files that an interrupted run finished enter the cache first, so that their images are not encoded again.
    commit(cache_uri)
    if not latest_manifest(cache_uri):
        return dict(wanted)
    cache = FeatureCache.open(cache_uri)
    done = set(cache.keys_with_attention(settings.vision.attention_layers))
    done |= {row.key for row in cache.quarantine() if not retryable(row.reason)}
    return {key: row for key, row in wanted.items() if key not in done}


def _summary(
    cache: FeatureCache,
    index: DatasetIndex,
    rows: list[IndexRow],
    wanted: Mapping[str, IndexRow],
    bad: list[QuarantineRow],
    num_read: int,
    num_encoded: int,
    encoding: Mapping[str, float],
    seconds: float,
) -> Summary:
    counts = {
        "images": len(rows),
        "distinct_images": len(wanted),
        "images_read": num_read,
        "images_encoded": num_encoded,
        "sub_images_cached": cache.num_sub_images,
        "images_cached": len(cache),
        "payload_bytes": cache.num_bytes,
        "quarantined": len(bad),
        "shadowed_rows": cache.manifest.num_shadowed,
        **encoding,
        **{f"codec_{name}": value for name, value in _codec_error(cache).items()},
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


def _codec_error(cache: FeatureCache) -> dict[str, float]:
    """Return the codec's errors, measured when rows were written; empty if an older release wrote all rows."""
    measured = summarise_errors(read_keys(cache.uri, cache.manifest))
    return {name: measured[name] for name in _CODEC_ERRORS if measured[name] is not None}


def plan(inputs: Inputs) -> str:
    """Describe the work of `run`, from the index and from the headers of images that the index lacks."""
    lines = [
        f"  {file.name}: {len(file):,} samples, {len(file.image_names):,} images, {len(file.problems)} unusable"
        for file in inputs.all_sets()
    ]
    return "\n".join(["cache_features: plan", *lines, estimate_cache(inputs).to_text()])


def _rows_of(index: DatasetIndex, sets: list[SampleSet]) -> list[IndexRow]:
    names = names_of_images(sets)
    return [row for row in index.rows() if row.name in names]


def _to_encode(rows: Iterable[IndexRow], pixels: PixelSettings) -> tuple[dict[str, IndexRow], list[QuarantineRow]]:
    """Return every distinct good image by image key, and the images that are refused: unreadable, too large or too long."""
    wanted: dict[str, IndexRow] = {}
    refused: list[QuarantineRow] = []
    for row in rows:
        if row.status == "bad":
            refused.append(_refusal(row, row.reason, f"{row.uri}: {row.reason}"))
            continue
        try:
            pixels.plan(row.width, row.height)
        except BadImageError as error:
            refused.append(_refusal(row, error.reason, str(error)))
        else:
            wanted.setdefault(row.image_key, row)
    return wanted, refused


def _refusal(row: IndexRow, reason: str, message: str) -> QuarantineRow:
    return QuarantineRow(row.image_key, row.name, reason, message, row.uri, row.size_bytes)


def _new_refusals(cache_uri: str, refused: Iterable[QuarantineRow]) -> list[QuarantineRow]:
    """Return the refusals that the cache's quarantine lacks, so that a second run writes nothing."""
    known = set(FeatureCache.open(cache_uri).quarantine()) if latest_manifest(cache_uri) else set()
    return [row for row in refused if row not in known]


def _check_share_of_bad(settings: RunSettings, num_images: int, bad: list[QuarantineRow]) -> None:
    if not settings.data.tolerates(len(bad), num_images):
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in collections.Counter(row.reason for row in bad).most_common()
        )
        raise QuarantineLimitError(
            f"{len(bad)} of {num_images} images are bad ({reasons}), for example {bad[0].name or bad[0].image_key}. "
            "The good images are cached. See `meteor data check`, repair the files and run again, or raise data.max_bad_share"
        )


if __name__ == "__main__":
    sys.exit(stage_main("cache_features", _DESCRIPTION, run, plan))
