"""Caches of a study's variants: images are encoded once, and other codecs are converted."""

import logging
from collections.abc import Iterable

from meteor.assembly import Inputs
from meteor.cache.manifest import latest_manifest
from meteor.cache.upkeep import transcode
from meteor.runs.tasks import Task
from pipelines import cache_features

_LOG = logging.getLogger(__name__)
# Caches in these codecs are filled first, as caches in other codecs can be made from them.
_LOSSLESS = ("float32", "bfloat16", "float16")


def fill_caches(inputs: Inputs, tasks: Iterable[Task]) -> None:
    """Run every cache_features task; convert features that a cache in another codec holds, instead of encoding again."""
    caches = [task for task in tasks if task.stage == "cache_features"]
    for task in sorted(caches, key=lambda task: task.settings.cache.codec not in _LOSSLESS):
        run = inputs.of(task.settings)
        source = other_codec(run)
        if source is not None:
            _convert(source, task.settings.cache.codec)
            inputs.refresh()
        summary = cache_features.run(run)
        _LOG.info(
            "cache for %d runs: %s of %s images encoded now, %s",
            len(task.used_by),
            summary.counts["images_encoded"] if not summary.reused else 0,
            summary.counts["distinct_images"],
            summary.results["cache"],
        )


def other_codec(inputs: Inputs) -> str | None:
    """Return the URI of a cache of these features in another, lossless codec; None if there is none."""
    settings = inputs.settings
    for codec in _LOSSLESS:
        if codec != settings.cache.codec:
            cache = settings.cache.model_copy(update={"codec": codec})
            uri = inputs.of(settings.model_copy(update={"cache": cache})).cache_uri()
            if latest_manifest(uri):
                return uri
    return None


def _convert(source: str, codec: str) -> None:
    """Make a cache in one codec from a cache in another."""
    is_logged = False

    def log_once(num_done: int, num_images: int) -> None:
        nonlocal is_logged
        if not is_logged:
            _LOG.info("cache in %s: converted from %s, without the encoder", codec, source)
            is_logged = True

    transcode(source, codec, on_progress=log_once)
