"""Before a stage trains: its samples, the index and cache it is pinned to, the digest of all that, the table of samples."""

import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from meteor import storage
from meteor.assembly import (
    cache_uri,
    cache_version,
    identity_of,
    index_uri,
    open_index,
    pixel_settings,
)
from meteor.cache import CacheIdentity, DatasetIndex, FeatureCache
from meteor.config import RunSettings, StageSettings, mathematical_settings, settings_digest
from meteor.data.sample_sets import SampleSet
from meteor.data.table_plan import IndexedImages, TablePlan, plan_table
from meteor.data.token_table import tokenise_set
from meteor.errors import CacheError, NotFoundError, QuarantineLimitError, SettingsError
from meteor.image.budget import visual_token_budget
from meteor.stages import TrainingStage
from meteor.text.tokens import load_tokenizer
from meteor.train.build import llm_fingerprint
from pipelines.inputs import load_mixture, load_set, mixture_digest, samples_uri
from pipelines.progress import ProgressLog
from pipelines.stage import StageRun, canonical

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """What a run read at its first start, and reads for ever: index and cache may grow meanwhile."""

    run_digest: str
    index_version: int
    index_digest: str
    cache_version: int


@dataclass(frozen=True)
class Prepared:
    """A stage before its workers start."""

    run: StageRun
    pin: Pin
    pin_uri: str
    identity: CacheIdentity
    samples: list[SampleSet]
    index: DatasetIndex
    parent: dict[str, str] | None


def stage_settings(settings: RunSettings, stage: TrainingStage) -> StageSettings:
    return settings.training(stage)


def prepare(settings: RunSettings, stage: TrainingStage) -> Prepared:
    """Find or make the pin and with it the run: its digest is over settings, samples, images, and the parent's digest.

    Raises:
        SettingsError: the stage has no samples, or stage 2 no stage 1.
        CacheError: cache_features has not run.
    """
    samples = load_mixture(settings, stage)
    identity = identity_of(settings)
    parent = _parent(settings) if stage == "finetune" else None
    content = content_of(settings, stage, samples, identity, parent["digest"] if parent else None)
    return _pinned(settings, stage, content, samples, identity, parent)


def content_of(
    settings: RunSettings, stage: TrainingStage, samples: list[SampleSet], identity: CacheIdentity, parent: str | None
) -> dict[str, Any]:
    """All that decides about a stage's numbers but the images: two stages that agree in it and in them are one run."""
    return canonical(
        {
            "stage": stage,
            "samples": mixture_digest(samples),
            "cache": identity.key,
            "codec": settings.cache.codec,
            "data": mathematical_settings(settings.data),
            "projector": mathematical_settings(settings.projector),
            "llm": {**mathematical_settings(settings.llm), "fingerprint": llm_fingerprint(settings.llm.path)},
            "settings": mathematical_settings(stage_settings(settings, stage)),
            "parent": parent,
        }
    )


def _pinned(
    settings: RunSettings,
    stage: TrainingStage,
    content: dict[str, Any],
    samples: list[SampleSet],
    identity: CacheIdentity,
    parent: dict[str, str] | None,
) -> Prepared:
    """An unfinished run keeps its pin; a finished one is taken up anew where the images have changed since.

    Versions that the settings name go before a pin.
    """
    pin_uri = storage.join(settings.output, "pins", f"{stage}-{settings_digest(content)[:16]}.json")
    current, index = _current_pin(settings, content, samples, identity)
    named = settings.cache.version is not None and settings.cache.index_version is not None
    pin = (None if named else _read_pin(pin_uri)) or current
    if pin.run_digest != current.run_digest and StageRun(settings, stage, pin.run_digest).finished():
        pin = current
    if pin.index_version != index.version:
        index = DatasetIndex.open(index_uri(settings), pin.index_version)
    return Prepared(StageRun(settings, stage, pin.run_digest), pin, pin_uri, identity, samples, index, parent)


def hold_pin(settings: RunSettings, prepared: Prepared) -> FeatureCache:
    """Write the pin: for the next start of this run, and in the cache, so that nothing it reads is cleaned up.

    Returns:
        The pinned version.
    """
    storage.write_json(prepared.pin_uri, vars(prepared.pin))
    cache = FeatureCache.open(cache_uri(settings, prepared.identity), version=prepared.pin.cache_version)
    cache.pin(prepared.pin.run_digest, {"name": settings.name, "stage": prepared.run.stage, "output": settings.output})
    return cache


def _current_pin(
    settings: RunSettings, content: dict[str, Any], samples: list[SampleSet], identity: CacheIdentity
) -> tuple[Pin, DatasetIndex]:
    index, version = open_index(settings), cache_version(settings, cache_uri(settings, identity))
    index_digest = index.digest(pa.concat_arrays([one.distinct_images for one in samples]))
    return Pin(settings_digest({**content, "index": index_digest}), index.version, index_digest, version), index


def _read_pin(uri: str) -> Pin | None:
    try:
        return Pin(**storage.read_json(uri))
    except NotFoundError:
        return None


def _parent(settings: RunSettings) -> dict[str, str]:
    """URI and digest of stage 1: the one named, or this run's own."""
    named = settings.finetune.pretrained
    if named:
        data = storage.read_bytes(named)
        return {"uri": named, "digest": settings_digest({"projector": data.hex()})}
    if not settings.data.sources("pretrain"):
        raise SettingsError("stage 2 needs a projector: set finetune.pretrained, or data.pretrain and run pretrain")
    own = prepare(settings, "pretrain")
    summary = own.run.finished()
    if summary is None:
        raise SettingsError(
            "stage 1 of this run has not finished: run pretrain with the same settings first, or set finetune.pretrained"
        )
    return {"uri": summary.results["projector"], "digest": own.run.digest}


def plan_samples(settings: RunSettings, stage: TrainingStage, prepared: Prepared) -> TablePlan:
    """The sample table of the pinned index and cache.

    Raises:
        QuarantineLimitError: too many samples cannot be used.
        CacheError: images are not in the cache.
    """
    options = stage_settings(settings, stage)
    plans = [
        _plan_set(settings, stage, prepared, one.share(options.fraction, options.seed)) for one in prepared.samples
    ]
    return plans[0] if len(plans) == 1 else TablePlan.mixture(plans, [one.weight for one in prepared.samples])


def plan_held_out(settings: RunSettings, stage: TrainingStage, prepared: Prepared) -> TablePlan | None:
    """The same of the samples whose loss is measured at checkpoints; None where the run names none.

    They belong to no run: what they hold changes nothing of what is trained.
    """
    uri = settings.data.held_out.get(stage)
    if uri is None:
        return None
    samples = load_set(settings, f"{stage}, held out", uri)
    if num_trained := samples.count_shared(prepared.samples):
        _LOG.warning("%s: %d of %d held-out samples are trained on too", stage, num_trained, len(samples))
    known = prepared.index.rows_named(samples.distinct_images)["name"].to_pylist()
    if unknown := sorted(samples.image_names.difference(known)):
        raise CacheError(
            f"{len(unknown)} images of data.held_out.{stage}, for example {unknown[0]!r}, are not in the index that this run "
            "was pinned to at its first start: run cache_features before it, or leave the held-out samples away"
        )
    return _plan_set(settings, stage, prepared, samples)


def _plan_set(settings: RunSettings, stage: TrainingStage, prepared: Prepared, samples: SampleSet) -> TablePlan:
    options = stage_settings(settings, stage)
    cache = FeatureCache.open(cache_uri(settings, prepared.identity), version=prepared.pin.cache_version)
    tokens = tokenise_set(
        samples,
        load_tokenizer(settings.llm.path),
        options.template,
        folder=samples_uri(settings),
        on_progress=ProgressLog(f"{samples.name}: tokenising: samples"),
    )
    plan = plan_table(
        samples,
        tokens,
        IndexedImages.from_rows(prepared.index.rows_named(samples.distinct_images), cache.quarantined()),
        budget=visual_token_budget(settings.projector.name, settings.projector.settings),
        pixels=pixel_settings(settings),
        max_length=options.max_length,
        sub_images=options.sub_images,
    )
    _check(settings, samples, plan, cache, options)
    return plan


def _check(
    settings: RunSettings, samples: SampleSet, plan: TablePlan, cache: FeatureCache, options: StageSettings
) -> None:
    num_samples = len(samples)
    limit = max(settings.data.min_bad_images - 1, settings.data.max_bad_share * num_samples)
    if len(plan.excluded) > limit:
        raise QuarantineLimitError(
            f"{len(plan.excluded)} of {num_samples} samples of {samples.uri} cannot be used ({plan.reasons()}), for example "
            f"{plan.excluded[0].sample_id}: {plan.excluded[0].message}. See `meteor data check`, or raise data.max_bad_share"
        )
    if not len(plan.table):
        raise SettingsError(f"no usable sample of {samples.uri} is left")
    num_missing = len(cache.missing(plan.table.flat_image_keys())) if options.features == "cache" else 0
    if num_missing:
        raise CacheError(
            f"{num_missing} images of {samples.uri} are indexed and not in version {cache.version} of {cache.uri}: run "
            "cache_features again"
        )
