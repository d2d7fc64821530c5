"""The plan of a run's cache: image sizes from the dataset index or from headers, shapes from configurations."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from meteor.assembly import (
    SampleFile,
    cache_identity,
    cache_uri,
    image_roots,
    index_uri,
    load_encoder,
    pixel_settings,
    read_samples,
    sample_files,
)
from meteor.cache import CODEC_NAMES, DatasetIndex, FeatureCache
from meteor.cache.codec import INT8_CODEC, get_codec
from meteor.cache.manifest import latest_manifest
from meteor.config import RunSettings
from meteor.data.inspect_image import inspect_image
from meteor.data.samples import Sample
from meteor.errors import BadImageError, SettingsError, TokenisationError
from meteor.image.budget import visual_token_budget
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, CachePlan, EncoderShape, StagePlan, plan_stage
from meteor.text.tokens import load_tokenizer, tokenise
from meteor.train.build import read_llm_config
from meteor.vision.encoder import FrozenClip

_NUM_HEADER_READERS = 32
# Text lengths vary little between thousands of samples: so many, evenly spread, give the mean.
_NUM_TOKENISED = 2000


def plan_cache(settings: RunSettings, inputs: "PlanInputs | None" = None) -> CachePlan:
    """What `cache_features` of this run will hold and cost.

    Args:
        settings: of the run.
        inputs: of the run before, in a row of plans.

    Raises:
        SettingsError: the run names no samples, or there is no encoder at ``vision.path``.
    """
    inputs = inputs or PlanInputs()
    survey, encoder = inputs.survey(settings), inputs.encoder(settings)
    sets, names, keys, plans = survey.sets, survey.names, survey.keys, survey.plans
    num_unindexed = len(names) - len(keys)
    distinct = {keys.get(name) or name: plan for name, plan in plans.items()}
    grids = [grid for plan in distinct.values() for grid in plan.patch_grids]
    shape = _encoder_shape(encoder)
    stages, note = _stages(settings, sets, plans, shape)
    num_layers, uri = len(settings.vision.attention_layers), cache_uri(settings, cache_identity(settings, encoder))
    return CachePlan(
        num_images=len(names),
        num_distinct=len(distinct),
        num_unindexed=num_unindexed,
        num_unusable=len(names) - len(plans),
        num_cached=len(distinct.keys() & _cached(uri)),
        num_sub_images=len(grids),
        num_patches=sum(rows * columns for rows, columns in grids),
        encoder_flops=sum(shape.flops(rows * columns) for rows, columns in grids),
        codec=settings.cache.codec,
        cache_uri=uri,
        size_bytes={
            codec: sum(_payload_bytes(codec, rows * columns, encoder.width, num_layers) for rows, columns in grids)
            for codec in CODEC_NAMES
        },
        stages=tuple(stages),
        note=note,
    )


class PlanInputs:
    """What plans of several runs read once, as long as nothing is written meanwhile: samples, images' sizes, the encoder.

    The variants of a study follow one another, and most of them show the same; the last of each is kept.
    """

    def __init__(self) -> None:
        self._survey: tuple[str, _Survey] | None = None
        self._encoder: tuple[str, FrozenClip] | None = None

    def survey(self, settings: RunSettings) -> "_Survey":
        key = repr((settings.data, settings.slicing, settings.evaluate, index_uri(settings)))
        if self._survey is None or self._survey[0] != key:
            self._survey = key, _survey(settings)
        return self._survey[1]

    def encoder(self, settings: RunSettings) -> FrozenClip:
        key = repr((settings.vision, settings.slicing.patch_size))
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = key, load_encoder(settings)
        return self._encoder[1]


@dataclass(frozen=True)
class _Survey:
    """A run's samples by file, the names of their images, and those images' image keys and plans (see `_indexed`)."""

    sets: list[tuple[SampleFile, list[Sample]]]
    names: list[str]
    keys: dict[str, str]
    plans: dict[str, SlicePlan]


def _survey(settings: RunSettings) -> _Survey:
    sets = [(file, read_samples(settings, file)[0]) for file in sample_files(settings)]
    names = sorted({image for _, samples in sets for sample in samples for image in sample.images})
    pixels = pixel_settings(settings)
    keys, plans = _indexed(settings, names, pixels)
    plans |= _from_headers([name for name in names if name not in keys], image_roots(settings), pixels)
    return _Survey(sets, names, keys, plans)


def _indexed(
    settings: RunSettings, names: Sequence[str], pixels: PixelSettings
) -> tuple[dict[str, str], dict[str, SlicePlan]]:
    """Name -> image key ("" if unknown) of the images in the index, and the plans of those that can be used."""
    index = DatasetIndex.latest(index_uri(settings))
    keys: dict[str, str] = {}
    plans: dict[str, SlicePlan] = {}
    wanted = set(names)
    for row in index.rows() if index else ():
        if row.name not in wanted:
            continue
        keys[row.name] = row.image_key
        if row.status == "ok":
            try:
                plans[row.name] = pixels.plan(row.width, row.height)
            except BadImageError:
                continue
    return keys, plans


def _from_headers(names: Sequence[str], roots: Mapping[str, str], pixels: PixelSettings) -> dict[str, SlicePlan]:
    with ThreadPoolExecutor(_NUM_HEADER_READERS) as pool:
        inspected = pool.map(lambda name: inspect_image(name, roots, pixels, full=False), names)
        return {one.name: one.plan for one in inspected if one.plan is not None}


def _cached(uri: str) -> set[str]:
    return set(FeatureCache.open(uri).keys()) if latest_manifest(uri) else set()


def _encoder_shape(encoder: FrozenClip) -> EncoderShape:
    layers = [encoder.select_layer, *encoder.attention_layers]
    num_blocks = max(layer if layer >= 0 else encoder.num_blocks + 1 + layer for layer in layers)
    return EncoderShape(encoder.width, encoder.model.config.intermediate_size, num_blocks, encoder.patch_size)


def _payload_bytes(codec: str, num_patches: int, width: int, num_layers: int) -> int:
    """Of one sub-image: patch features in the codec, attention rows and the class token in float32."""
    value_bytes = 1 if codec == INT8_CODEC else get_codec(codec).dtype.itemsize
    return num_patches * width * value_bytes + 4 * (num_patches * num_layers + width)


def _stages(
    settings: RunSettings,
    sets: Sequence[tuple[SampleFile, Sequence[Sample]]],
    plans: Mapping[str, SlicePlan],
    shape: EncoderShape,
) -> tuple[list[StagePlan], str]:
    try:
        num_parameters = count_llm_parameters(settings.llm.path)
        tokenizer = load_tokenizer(settings.llm.path)
    except (OSError, ValueError, SettingsError) as error:
        return [], f"no shares of training: llm.path={settings.llm.path!r} cannot be read here ({error})".split("\n")[0]
    budget = visual_token_budget(settings.projector.name, settings.projector.settings)
    stages = []
    for file, samples in sets:
        if file.stage is None or not file.weight:
            continue
        options = settings.training(file.stage)
        usable = [sample for sample in samples if all(image in plans for image in sample.images)]
        only_global = options.sub_images == "global"
        grids = [
            [plans[image].patch_grids[:1] if only_global else plans[image].patch_grids for image in sample.images]
            for sample in usable
        ]
        spread = usable[:: max(1, len(usable) // _NUM_TOKENISED)]
        lengths = [length for sample in spread if (length := _text_length(sample, tokenizer, options.template))]
        stages.append(
            plan_stage(
                file.name,
                grids,
                encoder=shape,
                epochs=options.epochs * file.weight * options.fraction,
                flops_per_parameter=FLOPS_PER_PARAMETER[file.stage],
                num_llm_parameters=num_parameters,
                num_visual_tokens=sum(sum(budget(one)) for sample in grids for one in sample),
                num_text_tokens=len(usable) * sum(lengths) / max(len(lengths), 1),
            )
        )
    return stages, ""


def _text_length(sample: Sample, tokenizer: Any, template: str) -> int | None:
    try:
        tokens = tokenise(sample.conversation, tokenizer, template, sample_id=sample.id)
    except TokenisationError:
        return None
    return len(tokens.input_ids) - len(sample.images)


@functools.lru_cache(maxsize=32)
def count_llm_parameters(path: str) -> int:
    """Parameters that multiply for each token: all but the embedding table, which is looked up."""
    config = read_llm_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    return total if tied else total - embeddings.numel()
