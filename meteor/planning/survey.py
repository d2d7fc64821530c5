"""Survey of a run's samples and images, and from it the cost of its feature cache.

Image sizes come from the dataset index or from file headers, and model shapes from configurations. Images are counted by slice
plan: a data set has a few hundred slice plans at most, so that one survey serves all variants of a study.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoModelForCausalLM

from meteor.assembly import Inputs, SampleFile, index_uri, pixel_settings, sample_files
from meteor.assembly.sample_sets import as_samples, distinct_images
from meteor.cache import CODEC_NAMES, DatasetIndex
from meteor.cache.codec import INT8_CODEC, get_codec
from meteor.cache.index import INDEX_SCHEMA
from meteor.config.settings import ProjectorSettings, VisionSettings
from meteor.data.inspect_image import inspect_image
from meteor.data.sample_sets import SampleSet
from meteor.data.token_table import tokenise_set
from meteor.errors import BadImageError, CacheError, SettingsError
from meteor.image.budget import Budget, visual_token_budget
from meteor.image.elastic import token_counts
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, CacheCost, StageCost, estimate_stage
from meteor.train.build import read_llm_config
from meteor.vision.checkpoint import read_vision_config
from meteor.vision.flops import EncoderShape

_NUM_HEADER_READERS = 32
# The mean text length is estimated from this many samples, evenly spread.
_NUM_TOKENISED = 2000


@dataclass(frozen=True, eq=False)
class _Images:
    """Images that can be used.

    Attributes:
        names: names of the images.
        keys: image keys if indexed, else names.
        plan_of: (N,) int, positions in ``plans``.
        plans: distinct slice plans.
    """

    names: pa.StringArray
    keys: pa.StringArray
    plan_of: np.ndarray
    plans: tuple[SlicePlan, ...]

    def count(self, plan_of: np.ndarray) -> dict[SlicePlan, int]:
        """Return slice plan -> how often its position stands in ``plan_of``."""
        counts = np.bincount(plan_of, minlength=len(self.plans)).tolist()
        return {plan: count for plan, count in zip(self.plans, counts, strict=True) if count}


@dataclass(frozen=True, eq=False)
class FileSurvey:
    """An annotation file's samples without those that show a bad or missing image.

    Attributes:
        file: the annotation file.
        usable: samples whose images can all be used.
        shown: slice plan -> number of times that the samples show an image with this plan.
    """

    file: SampleFile
    usable: SampleSet
    shown: Mapping[SlicePlan, int]


@dataclass(frozen=True, eq=False)
class Survey:
    """Samples and images of a run.

    Attributes:
        files: every annotation file.
        num_images: distinct names in the samples.
        num_unindexed: names that the index lacks; only their headers were read.
        num_unusable: images that are missing or refused.
        keys: distinct usable images, by image key if indexed, else by name.
        distinct: slice plan -> number of distinct usable images with this plan.
    """

    files: tuple[FileSurvey, ...]
    num_images: int
    num_unindexed: int
    num_unusable: int
    keys: pa.StringArray
    distinct: Mapping[SlicePlan, int]


def estimate_cache(inputs: Inputs) -> CacheCost:
    """Estimate size and cost of the cache that `cache_features` of this run fills.

    Raises:
        SettingsError: the run names no samples, or there is no encoder at ``vision.path``.
    """
    settings, survey = inputs.settings, survey_run(inputs)
    grids = _count_grids(survey.distinct)
    shape = encoder_shape(settings.vision)
    stages, note = _stages(inputs, survey, shape)
    num_layers, uri = len(settings.vision.attention_layers), inputs.cache_uri()
    return CacheCost(
        num_images=survey.num_images,
        num_distinct=len(survey.keys),
        num_unindexed=survey.num_unindexed,
        num_unusable=survey.num_unusable,
        num_cached=_count_cached(inputs, survey),
        num_sub_images=sum(grids.values()),
        num_patches=sum(count * rows * columns for (rows, columns), count in grids.items()),
        encoder_flops=sum(count * shape.flops(rows * columns) for (rows, columns), count in grids.items()),
        codec=settings.cache.codec,
        cache_uri=uri,
        size_bytes={
            codec: sum(
                count * _payload_bytes(codec, rows * columns, shape.width, num_layers)
                for (rows, columns), count in grids.items()
            )
            for codec in CODEC_NAMES
        },
        stages=tuple(stages),
        note=note,
    )


def survey_run(inputs: Inputs) -> Survey:
    """Survey a run; runs that read the same files in the same way share one survey."""
    try:
        index = inputs.index()
    except CacheError:  # cache_features has not run
        index = None
    settings, version = inputs.settings, index.version if index else 0
    # The slicing may be the encoder's.
    slicing = (settings.slicing.model_dump_json(), settings.vision.path)
    protocol = (settings.evaluate.preset, settings.evaluate.long_side)
    key = ("survey", settings.data.model_dump_json(), *slicing, *protocol)
    return inputs.once((*key, index_uri(settings), version), lambda: _survey(inputs, index))


def _survey(inputs: Inputs, index: DatasetIndex | None) -> Survey:
    sets = [(file, _read(inputs, file)) for file in sample_files(inputs.settings)]
    names = pc.unique(distinct_images(samples for _, samples in sets))
    indexed = index.rows_named(names) if index else INDEX_SCHEMA.empty_table()
    unindexed = names.filter(pc.invert(pc.is_in(names, value_set=indexed["name"])))
    images = _find_images(inputs, indexed, sorted(unindexed.to_pylist()))
    # An image may have several names; the first stands for it.
    keys = pc.unique(images.keys)
    first = pc.index_in(keys, value_set=images.keys).to_numpy()
    return Survey(
        files=tuple(_survey_file(file, samples, images) for file, samples in sets),
        num_images=len(names),
        num_unindexed=len(unindexed),
        num_unusable=len(names) - len(images.names),
        keys=keys,
        distinct=images.count(images.plan_of[first]),
    )


def _read(inputs: Inputs, file: SampleFile) -> SampleSet:
    if file.stage is not None:
        return inputs.sample_set(file.name, file.uri)
    return as_samples(inputs.question_set(file.name))


def _find_images(inputs: Inputs, indexed: pa.Table, unindexed: Sequence[str]) -> _Images:
    """Find the images that can be used, by their rows in the index or by their files' headers."""
    pixels = pixel_settings(inputs.settings)
    good = indexed.filter(pc.equal(indexed["status"], "ok"))
    sizes, size_of = np.unique(
        good["width"].to_numpy().astype(np.int64) << 32 | good["height"].to_numpy(), return_inverse=True
    )
    plans: dict[SlicePlan, int] = {}
    by_size = np.full(len(sizes), -1)
    for position, size in enumerate(sizes.tolist()):
        try:
            plan = pixels.plan(size >> 32, size & 0xFFFFFFFF)
        except BadImageError:
            continue
        by_size[position] = plans.setdefault(plan, len(plans))
    plan_of = by_size[size_of]
    is_usable = pa.array(plan_of >= 0)
    headers = _from_headers(unindexed, inputs.image_roots(), pixels) if unindexed else {}
    from_headers = [plans.setdefault(plan, len(plans)) for plan in headers.values()]
    names = [column.filter(is_usable) for column in (good["name"].combine_chunks(), good["image_key"].combine_chunks())]
    header_names = pa.array(headers, pa.string())
    return _Images(
        names=pa.concat_arrays([names[0], header_names]),
        keys=pa.concat_arrays([names[1], header_names]),
        plan_of=np.concatenate([plan_of[plan_of >= 0], np.array(from_headers, np.int64)]),
        plans=tuple(plans),
    )


def _survey_file(file: SampleFile, samples: SampleSet, images: _Images) -> FileSurvey:
    places = pc.index_in(samples.images.flatten(), value_set=images.names)
    num_shown = samples.images.value_lengths().to_numpy()
    ends = np.cumsum(num_shown)
    num_bad = np.concatenate([[0], np.cumsum(places.is_null().to_numpy(zero_copy_only=False))])
    usable = num_bad[ends] == num_bad[ends - num_shown]
    shown = places.filter(pa.array(np.repeat(usable, num_shown)))
    return FileSurvey(file, samples.select(np.flatnonzero(usable)), images.count(images.plan_of[shown.to_numpy()]))


def _from_headers(names: Sequence[str], roots: Mapping[str, str], pixels: PixelSettings) -> dict[str, SlicePlan]:
    with ThreadPoolExecutor(_NUM_HEADER_READERS) as pool:
        inspected = pool.map(lambda name: inspect_image(name, roots, pixels, full=False), names)
        return {image.name: image.plan for image in inspected if image.plan is not None}


def _count_cached(inputs: Inputs, survey: Survey) -> int:
    """Count the distinct images that the run's cache holds already."""
    try:
        cache = inputs.cache()
    except CacheError:  # there is none yet
        return 0
    return len(survey.keys) - len(cache.missing(survey.keys))


def _count_grids(plans: Mapping[SlicePlan, int], *, only_global: bool = False) -> Counter[tuple[int, int]]:
    """Return patch grid -> number of sub-images with this grid."""
    grids: Counter[tuple[int, int]] = Counter()
    for plan, count in plans.items():
        for grid in plan.patch_grids[:1] if only_global else plan.patch_grids:
            grids[grid] += count
    return grids


def encoder_shape(vision: VisionSettings) -> EncoderShape:
    """Return the shape of the run's encoder, with the blocks that are run."""
    return EncoderShape.of(
        read_vision_config(vision.path),
        select_layer=vision.select_layer,
        attention_layers=vision.attention_layers,
        importance=vision.importance,
    )


def _payload_bytes(codec: str, num_patches: int, width: int, num_layers: int) -> int:
    """Count the bytes of one sub-image: patch features in the codec, attention rows and class token in float32."""
    value_bytes = 1 if codec == INT8_CODEC else get_codec(codec).dtype.itemsize
    return num_patches * width * value_bytes + 4 * (num_patches * num_layers + width)


def _stages(inputs: Inputs, survey: Survey, shape: EncoderShape) -> tuple[list[StageCost], str]:
    """Return one cost per training file; or no cost, and the reason, if the language model cannot be read here."""
    settings = inputs.settings
    try:
        num_parameters = count_llm_parameters(settings.llm.path)
        inputs.tokenizer()
    except (OSError, ValueError, SettingsError) as error:
        reason = f"llm.path={settings.llm.path!r} cannot be read here ({error})"
        return [], f"training costs are missing: {reason}".split("\n")[0]
    budgets = _budgets(settings.projector)
    stages = []
    for surveyed in survey.files:
        file = surveyed.file
        if file.stage is None or not file.weight:
            continue
        options = settings.training(file.stage)
        only_global = options.sub_images == "global"
        visual = sum(
            share * count * sum(budget(plan.patch_grids[:1] if only_global else plan.patch_grids))
            for plan, count in surveyed.shown.items()
            for budget, share in budgets
        )
        stages.append(
            estimate_stage(
                file.name,
                _count_grids(surveyed.shown, only_global=only_global),
                num_samples=len(surveyed.usable),
                encoder=shape,
                epochs=options.epochs * file.weight * options.fraction,
                flops_per_parameter=FLOPS_PER_PARAMETER[file.stage],
                num_llm_parameters=num_parameters,
                num_visual_tokens=round(visual),
                num_text_tokens=len(surveyed.usable) * _mean_text(inputs, options.template, surveyed.usable),
            )
        )
    return stages, ""


def _budgets(projector: ProjectorSettings) -> list[tuple[Budget, float]]:
    """Return the budget of each number of visual tokens that training draws, with the share of its steps."""
    name, settings = projector.name, projector.settings
    counts = token_counts(name, settings)
    if counts is None or not counts.is_elastic:
        return [(visual_token_budget(name, settings), 1.0)]
    total = sum(counts.weights)
    return [
        (visual_token_budget(name, settings, k=k), weight / total)
        for k, weight in zip(counts.values, counts.weights, strict=True)
    ]


def _mean_text(inputs: Inputs, template: str, samples: SampleSet) -> float:
    """Return the mean number of text tokens per sample, measured on an even spread of the samples."""

    def measure() -> float:
        some = samples.select(range(0, len(samples), max(1, len(samples) // _NUM_TOKENISED)))
        lengths = tokenise_set(some, inputs.tokenizer(), template).lengths
        good = np.delete(lengths.num_text_tokens, list(lengths.problems))
        return float(good.mean()) if len(good) else 0.0

    return inputs.once(("mean text", inputs.settings.llm.path, template, samples.digest, samples.selection), measure)


@functools.lru_cache(maxsize=32)
def count_llm_parameters(path: str) -> int:
    """Count the parameters that multiply for each token: all but the embedding table, in which tokens are looked up."""
    config = read_llm_config(path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    return total if tied else total - embeddings.numel()
