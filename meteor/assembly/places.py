"""Places that settings name (annotation files, dataset index, feature cache), and the settings of pixels."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from meteor import storage
from meteor.cache import CacheIdentity
from meteor.config import RunSettings
from meteor.errors import SettingsError
from meteor.image.pixels import PixelSettings
from meteor.stages import TRAINING_STAGES, TrainingStage
from meteor.vision.checkpoint import read_preprocessing, read_vision_config
from meteor.vision.towers import TowerShape

# Data can be checked where the default encoder is out of reach.
_PUBLISHED = {
    "openai/clip-vit-large-patch14-336": {"resolution": 336, "patch_size": 14, "resample": "bicubic"},
}

_WILD = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class SampleFile:
    """An annotation file of a run.

    Attributes:
        name: name of the stage, followed by the file's name if the stage has several files; or the question set's name.
        uri: URI of the file, or of a benchmark's folder.
        stage: stage whose settings decide how the samples are read; None for questions.
        weight: passes over the file per epoch; 0 if the file is held out.
    """

    name: str
    uri: str
    stage: TrainingStage | None
    weight: float


def sample_files(settings: RunSettings) -> list[SampleFile]:
    """Return every annotation file that the run names.

    Raises:
        SettingsError: the run names no annotation file.
    """
    data = settings.data
    files = [file for stage in TRAINING_STAGES for file in training_files(settings, stage)]
    files += [SampleFile(f"{stage}, held out", uri, stage, 0.0) for stage, uri in data.held_out.items()]
    files += [SampleFile(name, questions.path, None, 0.0) for name, questions in data.evaluate.items()]
    if not files:
        raise SettingsError("the run names no samples: set data.pretrain, data.finetune or data.evaluate")
    return files


def training_files(settings: RunSettings, stage: TrainingStage) -> list[SampleFile]:
    """Return the annotation files that a stage trains on; empty if the run names none.

    Raises:
        SettingsError: two files have the same name.
    """
    sources = settings.data.sources(stage)
    names = short_names(sources)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(
            f"data.{stage} has two files with the name {twice[0]!r}, which would be part of their sample ids: rename a file"
        )
    return [
        SampleFile(stage if len(sources) == 1 else f"{stage}, {name}", uri, stage, weight)
        for name, (uri, weight) in zip(names, sources.items(), strict=True)
    ]


def short_names(uris: Iterable[str]) -> list[str]:
    """Return the name of each file; a pattern keeps the folders that tell it apart, as many end in ``train-*.parquet``."""
    parts = [PurePosixPath(uri).parts for uri in uris]
    names = [given[-1] for given in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1 and _WILD.search(name)}
        names = ["/".join(given[-depth:]) if name in twice else name for name, given in zip(names, parts, strict=True)]
    return names


def pixel_settings(settings: RunSettings) -> PixelSettings:
    """Return the settings that decide about the encoder's pixels, and about which images are refused.

    Raises:
        SettingsError: the settings leave a value to the encoder, and there is no readable encoder at ``vision.path``.
    """
    data = settings.data
    return PixelSettings(
        **encoder_slicing(settings), max_aspect_ratio=data.max_aspect_ratio, max_pixels=data.max_pixels
    )


def encoder_slicing(settings: RunSettings) -> dict[str, Any]:
    """Return ``max_slices``, ``resolution``, ``patch_size`` and ``resample``, with the encoder's values for omitted ones.

    Raises:
        SettingsError: a value is omitted, and there is no readable encoder at ``vision.path``.
    """
    given = settings.slicing.model_dump()
    if None not in given.values():
        return given
    own = _pixels_of(settings.vision.path)
    return {name: own[name] if value is None else value for name, value in given.items()}


@functools.lru_cache(maxsize=32)
def _pixels_of(path: str) -> dict[str, Any]:
    """Return the pixels that an encoder was trained on."""
    if path in _PUBLISHED:
        return _PUBLISHED[path]
    try:
        config = read_vision_config(path)
        shape, resample = TowerShape.of(config), read_preprocessing(path, config).resample
    except SettingsError as error:
        raise SettingsError(
            f"{error}. Without the encoder's files, set slicing.resolution, slicing.patch_size and slicing.resample"
        ) from error
    return {"resolution": shape.resolution, "patch_size": shape.patch_size, "resample": resample}


def index_uri(settings: RunSettings) -> str:
    """Return the URI of the dataset index; it lies beside the caches, as both outlive runs."""
    return storage.join(settings.cache_root, "index")


def samples_uri(settings: RunSettings) -> str:
    """Return the folder for the records and tokens of annotation files, beside the dataset index."""
    return storage.join(index_uri(settings), "samples")


def cache_uri(settings: RunSettings, identity: CacheIdentity) -> str:
    """Return the URI of the cache that the run reads and fills, in the run's codec."""
    return storage.join(settings.cache_root, identity.key, settings.cache.codec)
