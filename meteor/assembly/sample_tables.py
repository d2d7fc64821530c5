"""Sample tables of a training stage: of training samples and of held-out samples."""

import logging

from meteor.assembly.inputs import Inputs
from meteor.assembly.places import pixel_settings, samples_uri
from meteor.assembly.training_stage import PreparedStage
from meteor.data.indexed_images import IndexedImages
from meteor.data.sample_sets import SampleSet
from meteor.data.table_plan import TablePlan, plan_table
from meteor.data.token_table import tokenise_set
from meteor.errors import CacheError, QuarantineLimitError, SettingsError
from meteor.image.budget import visual_token_budget
from meteor.progress import ProgressLog

_LOG = logging.getLogger(__name__)


def plan_samples(inputs: Inputs, prepared: PreparedStage) -> TablePlan:
    """Plan the table of the samples that a stage trains on.

    Raises:
        QuarantineLimitError: too many samples cannot be used.
        CacheError: the cache lacks images.
    """
    options = inputs.settings.training(prepared.stage)
    plans = [_plan_set(inputs, prepared, file.share(options.fraction, options.seed)) for file in prepared.sets]
    return plans[0] if len(plans) == 1 else TablePlan.mixture(plans, [file.weight for file in prepared.sets])


def plan_held_out(inputs: Inputs, prepared: PreparedStage) -> TablePlan | None:
    """Plan the table of held-out samples, whose loss is measured at checkpoints; None if the run names none.

    Held-out samples do not change the training, so that they are no part of the stage's identity.

    Raises:
        CacheError: the index version that the stage reads lacks an image.
    """
    stage = prepared.stage
    uri = inputs.settings.data.held_out.get(stage)
    if uri is None:
        return None
    samples = inputs.sample_set(f"{stage}, held out", uri)
    if num_trained := samples.count_shared(prepared.sets):
        _LOG.warning("%s: %d of %d held-out samples are training samples too", stage, num_trained, len(samples))
    known = prepared.index.rows_named(samples.distinct_images)["name"].to_pylist()
    if unknown := sorted(samples.image_names.difference(known)):
        raise CacheError(
            f"{len(unknown)} images of data.held_out.{stage}, for example {unknown[0]!r}, are not in the index that this run "
            "was pinned to at its first start: run cache_features before the first start, or omit the held-out samples"
        )
    return _plan_set(inputs, prepared, samples)


def _plan_set(inputs: Inputs, prepared: PreparedStage, samples: SampleSet) -> TablePlan:
    settings, cache = inputs.settings, prepared.cache
    options = settings.training(prepared.stage)
    tokens = tokenise_set(
        samples,
        inputs.tokenizer(),
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
    num_records = len(samples) + len(samples.problems)
    if not settings.data.tolerates(len(plan.excluded), num_records):
        raise QuarantineLimitError(
            f"{len(plan.excluded)} of {num_records} samples of {samples.uri} cannot be used ({plan.reasons()}), for example "
            f"{plan.excluded[0].sample_id}: {plan.excluded[0].message}. See `meteor data check`, or raise data.max_bad_share"
        )
    if not len(plan.table):
        raise SettingsError(f"no usable sample of {samples.uri} is left")
    num_missing = len(cache.missing(plan.table.flat_image_keys())) if options.features == "cache" else 0
    if num_missing:
        raise CacheError(
            f"{num_missing} images of {samples.uri} are in the index but not in version {cache.version} of {cache.uri}: "
            "run cache_features again"
        )
    return plan
