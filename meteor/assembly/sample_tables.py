"""The sample tables of a training stage: the samples that are trained on, and those that are held out."""

import logging
from dataclasses import replace

from meteor.assembly.features import indexed_images, quarantine_into
from meteor.assembly.inputs import Inputs
from meteor.assembly.places import pixel_settings
from meteor.assembly.sample_sets import SampleSet
from meteor.assembly.training_stage import PreparedStage
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, StageSettings, settings_digest
from meteor.data.samples import Sample
from meteor.data.table import TablePlan, plan_table
from meteor.errors import CacheError, QuarantineLimitError, SettingsError
from meteor.image.budget import visual_token_budget
from meteor.stages import TrainingStage
from meteor.text.tokens import TokenisedSample, load_tokenizer, tokenise

_LOG = logging.getLogger(__name__)


def plan_samples(settings: RunSettings, stage: TrainingStage, prepared: PreparedStage) -> TablePlan:
    """Lay out the samples that the stage trains on.

    Raises:
        QuarantineLimitError: too many samples cannot be used.
        CacheError: images are not in the cache.
    """
    options = settings.training(stage)
    plans = [
        _plan_set(settings, stage, prepared, replace(file, samples=_fraction(file.samples, options)))
        for file in prepared.sets
    ]
    return plans[0] if len(plans) == 1 else TablePlan.mixture(plans, [file.weight for file in prepared.sets])


def plan_held_out(
    settings: RunSettings, stage: TrainingStage, prepared: PreparedStage, inputs: Inputs
) -> TablePlan | None:
    """Lay out the samples whose loss is measured at checkpoints; None if the run names none.

    They change nothing of what is trained, and are no part of the stage's identity.

    Raises:
        CacheError: an image is not in the index version that the stage reads.
    """
    uri = settings.data.held_out.get(stage)
    if uri is None:
        return None
    samples = inputs.sample_set(f"{stage}, held out", uri)
    trained = {(sample.images, sample.turns) for file in prepared.sets for sample in file.samples}
    if num_trained := sum((sample.images, sample.turns) in trained for sample in samples.samples):
        _LOG.warning("%s: %d of %d held-out samples are trained on too", stage, num_trained, len(samples.samples))
    known = {row.name for row in prepared.index.rows()}
    if unknown := sorted(samples.image_names - known):
        raise CacheError(
            f"{len(unknown)} images of data.held_out.{stage}, for example {unknown[0]!r}, are not in the index that this run "
            "was pinned to at its first start: run cache_features before it, or leave the held-out samples away"
        )
    return _plan_set(settings, stage, prepared, samples)


def _plan_set(settings: RunSettings, stage: TrainingStage, prepared: PreparedStage, samples: SampleSet) -> TablePlan:
    options, cache = settings.training(stage), prepared.cache
    plan = lay_out(settings, stage, prepared.index, cache, samples)
    num_samples = len(samples.samples)
    limit = max(settings.data.min_bad_images - 1, settings.data.max_bad_share * num_samples)
    if len(plan.excluded) > limit:
        raise QuarantineLimitError(
            f"{len(plan.excluded)} of {num_samples} samples of {samples.uri} cannot be used ({plan.reasons()}), for example "
            f"{plan.excluded[0].sample_id}: {plan.excluded[0].message}. See `meteor data check`, or raise data.max_bad_share"
        )
    if not len(plan.table):
        raise SettingsError(f"no usable sample of {samples.uri} is left")
    missing = set(plan.table.all_image_keys()) - set(cache.keys()) if options.features == "cache" else set()
    if missing:
        raise CacheError(
            f"{len(missing)} images of {samples.uri} are indexed and not in version {cache.version} of {cache.uri}: run "
            "cache_features again"
        )
    return plan


def lay_out(
    settings: RunSettings, stage: TrainingStage, index: DatasetIndex, cache: FeatureCache | None, samples: SampleSet
) -> TablePlan:
    """Tokenise samples and lay out their images as a stage would, without its limits on bad samples.

    Args:
        settings: settings of the run.
        stage: the stage whose template, length limit and sub-images count.
        index: sizes and states of the images.
        cache: its quarantine takes samples out; None if there is none yet.
        samples: the samples.
    """
    options, tokenizer = settings.training(stage), load_tokenizer(settings.llm.path)
    images = indexed_images(index, samples.image_names)

    def tokens(sample: Sample) -> TokenisedSample:
        return tokenise(sample.conversation, tokenizer, options.template, sample_id=sample.id)

    return plan_table(
        samples.samples,
        samples.problems,
        quarantine_into(images, cache.quarantined()) if cache else images,
        tokenise=tokens,
        budget=visual_token_budget(settings.projector.name, settings.projector.settings),
        pixels=pixel_settings(settings),
        max_length=options.max_length,
        sub_images=options.sub_images,
    )


def _fraction(samples: list[Sample], options: StageSettings) -> list[Sample]:
    """A seeded share of the samples, in their order."""
    if options.fraction == 1:
        return samples
    ranked = sorted(range(len(samples)), key=lambda i: settings_digest([options.seed, i]))
    return [samples[i] for i in sorted(ranked[: max(1, round(options.fraction * len(samples)))])]
