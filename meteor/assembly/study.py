"""Variants of a study, its folder, and the versions of index and caches that all variants read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from meteor import storage
from meteor.assembly.inputs import Inputs
from meteor.assembly.sample_sets import distinct_images
from meteor.cache import DatasetIndex, FeatureCache
from meteor.checksums import read_checked_json, write_checked_json
from meteor.config import RunSettings, Variant, expand_study, resolve_paths, settings_digest
from meteor.errors import NotFoundError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyPins:
    """Versions that all variants of a study read, even if newer versions are published.

    Attributes:
        index_version: version of the dataset index.
        caches: cache URI -> version.
    """

    index_version: int
    caches: dict[str, int]

    def apply(self, variant: Variant, inputs: Inputs) -> Variant:
        """Return the variant with these versions in its settings."""
        settings = variant.settings
        versions = {"index_version": self.index_version, "version": self.caches.get(inputs.of(settings).cache_uri())}
        cache = settings.cache.model_copy(update=versions)
        return replace(variant, settings=settings.model_copy(update={"cache": cache}))


def study_variants(settings: RunSettings) -> list[Variant]:
    """Return all variants of a run's study, with absolute paths; for errors see `expand_study`."""
    return [replace(variant, settings=resolve_paths(variant.settings)) for variant in expand_study(settings)]


def pinned_variants(inputs: Inputs, variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants with the study's pinned versions; before the study's first start they read the newest."""
    pins = read_pins(inputs.settings)
    return [pins.apply(variant, inputs) for variant in variants] if pins else list(variants)


def study_uri(settings: RunSettings, *parts: str) -> str:
    """Return the URI of the study's folder, or of a file in it."""
    return storage.join(settings.output, "studies", settings.name, *parts)


def read_pins(settings: RunSettings) -> StudyPins | None:
    """Read the study's pins; None before its first start."""
    try:
        return StudyPins(**read_checked_json(study_uri(settings, "pins.json")))
    except NotFoundError:
        return None


def hold_pins(inputs: Inputs, variants: Sequence[Variant]) -> StudyPins:
    """Pin a study to its versions at its first start, and again if they lack an image of a variant that was added later.

    With new pins, a variant whose images have changed runs its stages again: results from different images are never compared.

    Raises:
        CacheError: cache_features has not run for all variants.
    """
    settings = inputs.settings
    runs = {run.cache_uri(): run for run in (inputs.of(variant.settings) for variant in variants)}
    pins = read_pins(settings)
    if pins is None or not _holds_all(inputs.index_version(pins.index_version), pins.caches, runs):
        if pins is not None:
            _LOG.info("%s: there are new images or caches; all variants now read the newest versions", settings.name)
        newest = {uri: run.cache_version() for uri, run in runs.items()}
        pins = StudyPins(inputs.index().version, newest)
        write_checked_json(study_uri(settings, "pins.json"), vars(pins))
    for uri, version in pins.caches.items():
        holder = settings_digest({"study": settings.name, "output": settings.output, "version": version})
        FeatureCache.open(uri, version=version).pin(holder, {"name": settings.name, "study": study_uri(settings)})
    return pins


def _holds_all(index: DatasetIndex, caches: Mapping[str, int], runs: Mapping[str, Inputs]) -> bool:
    """Return whether the index and the caches at these versions hold every image of every run."""
    if not runs.keys() <= caches.keys():
        return False
    for uri, run in runs.items():
        names = pc.unique(distinct_images(run.all_sets()))
        rows = index.rows_named(names)
        if len(rows) < len(names):
            return False
        cache = run.cache_at(caches[uri])
        good = rows.filter(pc.equal(rows["status"], "ok"))
        if set(cache.missing(good["image_key"].combine_chunks()).to_pylist()) - cache.quarantined().keys():
            return False
    return True
