"""Survey of a run's samples and images, and from it the cost of its feature cache.

Image sizes come from the dataset index, or from file headers; shapes come from configurations. Images are counted by slice
plan, of which a data set has a few hundred at most, so that one survey serves all variants of a study.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from meteor.assembly import Inputs, SampleFile, index_uri, pixel_settings, sample_files
from meteor.assembly.sample_sets import SampleSet, as_samples
from meteor.cache import CODEC_NAMES, DatasetIndex, FeatureCache
from meteor.cache.codec import INT8_CODEC, get_codec
from meteor.cache.manifest import latest_manifest
from meteor.config import RunSettings
from meteor.data.inspect_image import inspect_image
from meteor.errors import BadImageError, SettingsError, TokenisationError
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, CacheCost, EncoderShape, StageCost, estimate_stage
from meteor.text.tokens import load_tokenizer, tokenise
from meteor.train.build import read_llm_config
from meteor.vision.encoder import FrozenClip

_NUM_HEADER_READERS = 32
# Text lengths vary little between thousands of samples: this many, evenly spread, give the mean.
_NUM_TOKENISED = 2000


@dataclass(frozen=True)
class FileSurvey:
    """An annotation file's samples, as far as all their images can be used.

    Attributes:
        file: the file.
        samples: the samples as they were read, usable or not.
        num_usable: samples without a bad or missing image.
        shown: slice plan -> number of times that usable samples show an image with this plan.
    """

    file: SampleFile
    samples: SampleSet
    num_usable: int
    shown: Mapping[SlicePlan, int]


@dataclass(frozen=True)
class Survey:
    """Samples and images of a run.

    Attributes:
        files: every annotation file.
        num_images: distinct names in the samples.
        num_unindexed: names that the index lacks; only their headers were read.
        num_unusable: images that are missing or refused.
        keys: distinct usable images, by image key if indexed, else by name.
        distinct: slice plan -> number of distinct usable images with this plan.
        plans: image name -> slice plan of each usable image.
    """

    files: tuple[FileSurvey, ...]
    num_images: int
    num_unindexed: int
    num_unusable: int
    keys: frozenset[str]
    distinct: Mapping[SlicePlan, int]
    plans: Mapping[str, SlicePlan]


def estimate_cache(settings: RunSettings, inputs: Inputs) -> CacheCost:
    """Estimate size and cost of the cache that `cache_features` of this run fills.

    Raises:
        SettingsError: the run names no samples, or there is no encoder at ``vision.path``.
    """
    survey, encoder = survey_run(settings, inputs), inputs.encoder(settings)
    grids = _count_grids(survey.distinct)
    shape = _encoder_shape(encoder)
    stages, note = _stages(settings, survey, shape, inputs)
    num_layers, uri = len(settings.vision.attention_layers), inputs.cache_uri(settings)
    return CacheCost(
        num_images=survey.num_images,
        num_distinct=len(survey.keys),
        num_unindexed=survey.num_unindexed,
        num_unusable=survey.num_unusable,
        num_cached=len(survey.keys & _cached(uri, inputs)),
        num_sub_images=sum(grids.values()),
        num_patches=sum(count * rows * columns for (rows, columns), count in grids.items()),
        encoder_flops=sum(count * shape.flops(rows * columns) for (rows, columns), count in grids.items()),
        codec=settings.cache.codec,
        cache_uri=uri,
        size_bytes={
            codec: sum(
                count * _payload_bytes(codec, rows * columns, encoder.width, num_layers)
                for (rows, columns), count in grids.items()
            )
            for codec in CODEC_NAMES
        },
        stages=tuple(stages),
        note=note,
    )


def survey_run(settings: RunSettings, inputs: Inputs) -> Survey:
    """Survey a run; runs that read the same files in the same way share one survey."""
    index = find_index(settings, inputs)
    version = index.version if index else 0
    key = ("survey", settings.data.model_dump_json(), settings.slicing.model_dump_json(), settings.evaluate.long_side)
    return inputs.once((*key, index_uri(settings), version), lambda: _survey(settings, inputs, index))


def find_index(settings: RunSettings, inputs: Inputs) -> DatasetIndex | None:
    """The newest dataset index; None before cache_features has run."""
    version = settings.cache.index_version or DatasetIndex.latest_version(index_uri(settings))
    return inputs.index_version(settings, version) if version else None


def _survey(settings: RunSettings, inputs: Inputs, index: DatasetIndex | None) -> Survey:
    sets = [(file, _read(settings, file, inputs)) for file in sample_files(settings)]
    names = sorted(set().union(*(samples.image_names for _, samples in sets)))
    pixels = pixel_settings(settings)
    keys, plans = _indexed(index, set(names), pixels)
    unindexed = [name for name in names if name not in keys]
    plans |= _from_headers(unindexed, inputs.image_roots(settings), pixels)
    distinct = {keys.get(name) or name: plan for name, plan in plans.items()}
    return Survey(
        files=tuple(_survey_file(file, samples, plans) for file, samples in sets),
        num_images=len(names),
        num_unindexed=len(unindexed),
        num_unusable=len(names) - len(plans),
        keys=frozenset(distinct),
        distinct=Counter(distinct.values()),
        plans=plans,
    )


def _read(settings: RunSettings, file: SampleFile, inputs: Inputs) -> SampleSet:
    if file.stage is not None:
        return inputs.sample_set(file.name, file.uri)
    return as_samples(inputs.question_set(settings, file.name))


def _survey_file(file: SampleFile, samples: SampleSet, plans: Mapping[str, SlicePlan]) -> FileSurvey:
    shown: Counter[SlicePlan] = Counter()
    num_usable = 0
    for sample in samples.samples:
        if all(image in plans for image in sample.images):
            num_usable += 1
            shown.update(plans[image] for image in sample.images)
    return FileSurvey(file, samples, num_usable, shown)


def _indexed(
    index: DatasetIndex | None, wanted: set[str], pixels: PixelSettings
) -> tuple[dict[str, str], dict[str, SlicePlan]]:
    """Name -> image key ("" if unknown) of the images in the index, and name -> plan of those that can be used."""
    plan = functools.cache(pixels.plan)
    keys: dict[str, str] = {}
    plans: dict[str, SlicePlan] = {}
    for row in index.rows() if index else ():
        if row.name not in wanted:
            continue
        keys[row.name] = row.image_key
        if row.status == "ok":
            try:
                plans[row.name] = plan(row.width, row.height)
            except BadImageError:
                continue
    return keys, plans


def _from_headers(names: Sequence[str], roots: Mapping[str, str], pixels: PixelSettings) -> dict[str, SlicePlan]:
    with ThreadPoolExecutor(_NUM_HEADER_READERS) as pool:
        inspected = pool.map(lambda name: inspect_image(name, roots, pixels, full=False), names)
        return {image.name: image.plan for image in inspected if image.plan is not None}


def _cached(uri: str, inputs: Inputs) -> frozenset[str]:
    version = latest_manifest(uri)
    if not version:
        return frozenset()
    return inputs.once(("cached keys", uri, version), lambda: frozenset(FeatureCache.open(uri, version=version).keys()))


def _count_grids(plans: Mapping[SlicePlan, int], *, only_global: bool = False) -> Counter[tuple[int, int]]:
    """Patch grid -> number of sub-images with this grid."""
    grids: Counter[tuple[int, int]] = Counter()
    for plan, count in plans.items():
        for grid in plan.patch_grids[:1] if only_global else plan.patch_grids:
            grids[grid] += count
    return grids


def _encoder_shape(encoder: FrozenClip) -> EncoderShape:
    layers = [encoder.select_layer, *encoder.attention_layers]
    num_blocks = max(layer if layer >= 0 else encoder.num_blocks + 1 + layer for layer in layers)
    return EncoderShape(encoder.width, encoder.model.config.intermediate_size, num_blocks, encoder.patch_size)


def _payload_bytes(codec: str, num_patches: int, width: int, num_layers: int) -> int:
    """Bytes of one sub-image: patch features in the codec, attention rows and the class token in float32."""
    value_bytes = 1 if codec == INT8_CODEC else get_codec(codec).dtype.itemsize
    return num_patches * width * value_bytes + 4 * (num_patches * num_layers + width)


def _stages(settings: RunSettings, survey: Survey, shape: EncoderShape, inputs: Inputs) -> tuple[list[StageCost], str]:
    """One cost per training file; or none, with the reason, if the language model cannot be read here."""
    try:
        num_parameters = count_llm_parameters(settings.llm.path)
        load_tokenizer(settings.llm.path)
    except (OSError, ValueError, SettingsError) as error:
        return [], f"no shares of training: llm.path={settings.llm.path!r} cannot be read here ({error})".split("\n")[0]
    budget = visual_token_budget(settings.projector.name, settings.projector.settings)
    stages = []
    for found in survey.files:
        file = found.file
        if file.stage is None or not file.weight:
            continue
        options = settings.training(file.stage)
        only_global = options.sub_images == "global"
        visual = sum(
            count * sum(budget(plan.patch_grids[:1] if only_global else plan.patch_grids))
            for plan, count in found.shown.items()
        )
        stages.append(
            estimate_stage(
                file.name,
                _count_grids(found.shown, only_global=only_global),
                num_samples=found.num_usable,
                encoder=shape,
                epochs=options.epochs * file.weight * options.fraction,
                flops_per_parameter=FLOPS_PER_PARAMETER[file.stage],
                num_llm_parameters=num_parameters,
                num_visual_tokens=visual,
                num_text_tokens=found.num_usable
                * _mean_text(settings.llm.path, options.template, found, survey, inputs),
            )
        )
    return stages, ""


def _mean_text(llm: str, template: str, found: FileSurvey, survey: Survey, inputs: Inputs) -> float:
    """Mean number of text tokens of the file's usable samples, from an even spread of them."""

    def measure() -> float:
        tokenizer = load_tokenizer(llm)
        usable = [s for s in found.samples.samples if all(image in survey.plans for image in s.images)]
        lengths = []
        for sample in usable[:: max(1, len(usable) // _NUM_TOKENISED)]:
            try:
                tokens = tokenise(sample.conversation, tokenizer, template, sample_id=sample.id)
            except TokenisationError:
                continue
            lengths.append(len(tokens.input_ids) - len(sample.images))
        return sum(lengths) / max(len(lengths), 1)

    return inputs.once(("mean text", llm, template, found.samples.digest), measure)


@functools.lru_cache(maxsize=32)
def count_llm_parameters(path: str) -> int:
    """Parameters that multiply for each token: all but the embedding table, which is looked up."""
    config = read_llm_config(path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    return total if tied else total - embeddings.numel()
