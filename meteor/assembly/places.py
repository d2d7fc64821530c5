"""Places that settings name: annotation files, the dataset index, the feature cache; and the settings of pixels."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from meteor import storage
from meteor.cache import CacheIdentity
from meteor.config import RunSettings
from meteor.errors import SettingsError
from meteor.image.pixels import PixelSettings
from meteor.stages import TRAINING_STAGES, TrainingStage


@dataclass(frozen=True)
class SampleFile:
    """An annotation file of a run.

    Attributes:
        name: the stage, with the file's name if the stage has several files; a question set's own name.
        uri: the file; for a benchmark its folder.
        stage: the stage whose settings say how the samples are read; None for questions.
        weight: passes over the file per epoch; 0 if the file is held out.
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
    """The annotation files that a stage trains on; empty if the run names none.

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


def pixel_settings(settings: RunSettings) -> PixelSettings:
    """Settings that decide the encoder's pixels and which images are refused."""
    slicing, data = settings.slicing, settings.data
    return PixelSettings(
        max_slices=slicing.max_slices,
        resolution=slicing.resolution,
        patch_size=slicing.patch_size,
        max_aspect_ratio=data.max_aspect_ratio,
        max_pixels=data.max_pixels,
    )


def index_uri(settings: RunSettings) -> str:
    """The dataset index; it lies beside the caches, as both outlive runs."""
    return storage.join(settings.cache_root, "index")


def samples_uri(settings: RunSettings) -> str:
    """The folder of records and tokens of annotation files, beside the dataset index."""
    return storage.join(index_uri(settings), "samples")


def cache_uri(settings: RunSettings, identity: CacheIdentity) -> str:
    """The cache, in the run's codec, that the run reads and fills."""
    return storage.join(settings.cache_root, identity.key, settings.cache.codec)
