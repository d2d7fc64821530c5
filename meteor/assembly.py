"""From a run's settings to what several commands and stages share: sizes of pixels, the encoder, places of caches."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import torch

from meteor import storage
from meteor.cache import CacheIdentity, DatasetIndex
from meteor.cache.manifest import latest_manifest
from meteor.config import RunSettings
from meteor.config.settings import SlicingSettings, VisionSettings
from meteor.data.samples import Sample, SampleProblem, load_samples
from meteor.errors import CacheError, SettingsError
from meteor.evaluation.question_set import QuestionSet, load_question_set
from meteor.image.pixels import PixelSettings
from meteor.stages import TRAINING_STAGES, TrainingStage
from meteor.vision.encoder import FrozenClip


@dataclass(frozen=True)
class SampleFile:
    """An annotation file of a run.

    Attributes:
        name: the stage, with the file's name where it has several; a question set's own name.
        uri: where it is; a benchmark's folder.
        stage: whose settings say how its samples are read; None for questions.
        weight: passes over it in an epoch; 0 where it is held out.
    """

    name: str
    uri: str
    stage: TrainingStage | None
    weight: float


def sample_files(settings: RunSettings) -> list[SampleFile]:
    """Every annotation file that the run names.

    Raises:
        SettingsError: the run names none.
    """
    data = settings.data
    files = [file for stage in TRAINING_STAGES for file in training_files(settings, stage)]
    files += [SampleFile(f"{stage}, held out", uri, stage, 0.0) for stage, uri in data.held_out.items()]
    files += [SampleFile(name, questions.path, None, 0.0) for name, questions in data.evaluate.items()]
    if not files:
        raise SettingsError("the run names no samples: set data.pretrain, data.finetune or data.evaluate")
    return files


def training_files(settings: RunSettings, stage: TrainingStage) -> list[SampleFile]:
    """The files that a stage trains on.

    Raises:
        SettingsError: two of them have the same name.
    """
    sources = settings.data.sources(stage)
    names = [PurePosixPath(uri).name for uri in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"data.{stage} names two files {twice[0]!r}, and samples are told apart by it: rename one")
    return [
        SampleFile(stage if len(sources) == 1 else f"{stage}, {name}", uri, stage, weight)
        for name, (uri, weight) in zip(names, sources.items(), strict=True)
    ]


def read_samples(settings: RunSettings, file: SampleFile) -> tuple[list[Sample], list[SampleProblem]]:
    """The samples of a file, and its records that cannot be used; of a question set what is asked."""
    if file.stage is not None:
        return load_samples(file.uri)
    found = load_questions(settings, file.name)
    return [question.sample for question in found.questions], list(found.problems)


_question_sets: dict[str, QuestionSet] = {}


def load_questions(settings: RunSettings, name: str) -> QuestionSet:
    """A question set of the run, which a process reads once as long as its files stay as they are.

    Raises:
        NotFoundError: a file is missing; with where it is to be had.
        SettingsError, DataError: see `meteor.evaluation.question_set.load_question_set`.
    """
    wanted = settings.data.evaluate[name]
    arguments = {
        **wanted.model_dump(exclude={"path"}),
        "uri": wanted.path,
        "embedded_root": storage.join(settings.cache_root, "question_images"),
        "long_side": settings.evaluate.long_side,
    }
    key = json.dumps([name, arguments])
    known = _question_sets.get(key)
    if known is None or any(storage.stat(uri).etag != etag for uri, etag in known.sources.items()):
        known = _question_sets[key] = load_question_set(name, **arguments)
    return known


def question_sets(settings: RunSettings) -> list[QuestionSet]:
    """All question sets of the run; none where it names none."""
    return [load_questions(settings, name) for name in settings.data.evaluate]


def image_roots(settings: RunSettings) -> dict[str, str]:
    """The run's image roots, and what ``@<question set>/`` stands for."""
    own = {one.prefix: one.image_root for one in question_sets(settings) if one.image_root is not None}
    return {**settings.data.roots, **own}


def pixel_settings(settings: RunSettings) -> PixelSettings:
    """What decides about the encoder's pixels, and about the images it refuses."""
    slicing, data = settings.slicing, settings.data
    return PixelSettings(
        max_slices=slicing.max_slices,
        resolution=slicing.resolution,
        patch_size=slicing.patch_size,
        max_aspect_ratio=data.max_aspect_ratio,
        max_pixels=data.max_pixels,
    )


def load_encoder(settings: RunSettings, *, device: str | None = None) -> FrozenClip:
    """The frozen tower of the settings.

    Raises:
        SettingsError: there is none at that path, or its patches are not the slicing's.
    """
    vision = settings.vision
    encoder = FrozenClip.from_pretrained(
        vision.path,
        select_layer=vision.select_layer,
        attention_layers=vision.attention_layers,
        dtype=getattr(torch, vision.dtype),
        device=device,
    )
    if encoder.patch_size != settings.slicing.patch_size:
        raise SettingsError(
            f"slicing.patch_size={settings.slicing.patch_size}, but {vision.path} has patches of {encoder.patch_size} pixels"
        )
    return encoder


def cache_identity(settings: RunSettings, encoder: FrozenClip) -> CacheIdentity:
    """The identity of the cache that this encoder and these settings make."""
    return CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype=settings.vision.dtype,
        select_layer=settings.vision.select_layer,
        preprocessing=encoder.preprocessing,
        slicing=settings.slicing.model_dump(),
    )


def identity_of(settings: RunSettings) -> CacheIdentity:
    """The same of the run's own encoder, whose weights a process reads for it once."""
    return _identity(settings.vision, settings.slicing)


@lru_cache(maxsize=16)
def _identity(vision: VisionSettings, slicing: SlicingSettings) -> CacheIdentity:
    settings = RunSettings(vision=vision, slicing=slicing)
    return cache_identity(settings, load_encoder(settings))


def index_uri(settings: RunSettings) -> str:
    """The dataset index lies beside the caches: both outlive runs."""
    return storage.join(settings.cache_root, "index")


def open_index(settings: RunSettings) -> DatasetIndex:
    """The version of the dataset index that a run reads which starts now.

    Raises:
        CacheError: cache_features has not run.
    """
    uri, version = index_uri(settings), settings.cache.index_version
    index = DatasetIndex.open(uri, version) if version else DatasetIndex.latest(uri)
    if index is None:
        raise CacheError(f"there is no dataset index at {uri}: run cache_features first")
    return index


def cache_uri(settings: RunSettings, identity: CacheIdentity) -> str:
    """The variant of the cache that the run reads and fills."""
    return storage.join(settings.cache_root, identity.key, settings.cache.codec)


def cache_version(settings: RunSettings, uri: str) -> int:
    """The version of the cache at ``uri`` that a run reads which starts now.

    Raises:
        CacheError: cache_features has not run.
    """
    version = settings.cache.version or latest_manifest(uri)
    if not version:
        raise CacheError(f"there is no feature cache at {uri}: run cache_features with these settings first")
    return version
