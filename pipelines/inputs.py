"""What several stages read first: sample files, images' places, the encoder and the cache identity it makes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath

import pyarrow as pa

from meteor import storage
from meteor.assembly import index_uri, load_encoder, pixel_settings, question_sets, sample_files, training_files
from meteor.cache import DatasetIndex, FeatureCache, IndexRow
from meteor.cache.disk_tier import DiskTier
from meteor.config import RunSettings, settings_digest
from meteor.data import sample_sets
from meteor.data.sample_sets import SampleSet
from meteor.data.table_plan import IndexedImage
from meteor.errors import SettingsError
from meteor.evaluation.question_set import QuestionSet
from meteor.stages import TrainingStage
from meteor.vision.live import LiveFeatures
from pipelines.progress import ProgressLog


def load_set(settings: RunSettings, name: str, uri: str) -> SampleSet:
    """The sample set of a file, with a line every few seconds while it is read for the first time."""
    on_progress = ProgressLog(f"{name}: reading: samples")
    return sample_sets.load_set(uri, name=name, folder=samples_uri(settings), on_progress=on_progress)


def samples_uri(settings: RunSettings) -> str:
    """The folder of records and tokens of annotation files, beside the dataset index."""
    return storage.join(index_uri(settings), "samples")


def load_sets(settings: RunSettings) -> list[SampleSet]:
    """All sample sets of the run; `SettingsError` where it names none."""
    files = [load_set(settings, file.name, file.uri) for file in sample_files(settings) if file.stage is not None]
    return files + [as_samples(one) for one in question_sets(settings)]


def as_samples(questions: QuestionSet) -> SampleSet:
    """What a question set asks."""
    samples = [question.sample for question in questions.questions]
    return SampleSet.of(questions.name, samples, list(questions.problems), uri=questions.uri, digest=questions.digest)


def load_mixture(settings: RunSettings, stage: TrainingStage) -> list[SampleSet]:
    """What a stage trains on, in an order that depends on the files' content alone.

    Of several files each sample's id begins with its file's name.

    Raises:
        SettingsError: there is none, or the same file twice.
    """
    files = training_files(settings, stage)
    if not files:
        raise SettingsError(f"data.{stage} is not set: name the LLaVA JSON of this stage")
    sets = [replace(load_set(settings, file.name, file.uri), weight=file.weight) for file in files]
    if len(sets) > 1:
        named = [one.with_prefix(f"{PurePosixPath(one.uri).name}/") for one in sets]
        sets = sorted(named, key=lambda one: one.digest)
    for one, other in pairwise(sets):
        if one.digest == other.digest:
            raise SettingsError(
                f"data.{stage}: {one.uri} and {other.uri} are the same file: give one of them the weight"
            )
    return sets


def mixture_digest(sets: Sequence[SampleSet]) -> str:
    """The file's own where there is one and it weighs 1."""
    if [one.weight for one in sets] == [1]:
        return sets[0].digest
    return settings_digest([[one.digest, one.weight] for one in sets])


def names_of_images(sets: Iterable[SampleSet]) -> set[str]:
    return set().union(*(one.image_names for one in sets))


def indexed_images(index: DatasetIndex, names: Iterable[str]) -> dict[str, IndexedImage]:
    """What the index says about the images of these names; names it does not have are left out."""
    rows = index.rows_named(pa.array(list(names), pa.string()))
    columns = [rows[name].to_pylist() for name in ("name", "image_key", "width", "height", "reason")]
    return {name: IndexedImage(*rest) for name, *rest in zip(*columns, strict=True)}


def quarantine_into(images: Mapping[str, IndexedImage], quarantined: Mapping[str, str]) -> dict[str, IndexedImage]:
    """The same images, with the reasons of those that the encoder refused."""
    return {
        name: IndexedImage(
            image.image_key, image.width, image.height, image.reason or quarantined.get(image.image_key, "")
        )
        for name, image in images.items()
    }


def open_features(
    settings: RunSettings, source: str, *, cache: str, version: int, uris: Mapping[str, str], device: str
) -> FeatureCache | LiveFeatures:
    """The feature source of a worker: the pinned cache version, or the encoder itself."""
    if source == "cache":
        options = settings.cache
        # In front of a local cache it would keep the same bytes twice.
        tier = (
            DiskTier(options.disk_tier, int(options.disk_tier_gb * 10**9))
            if options.disk_tier and cache.startswith("s3://")
            else None
        )
        return FeatureCache.open(cache, version=version, disk_tier=tier)
    return LiveFeatures(load_encoder(settings, device=device), uris, pixel_settings(settings))


def uris_by_key(rows: Iterable[IndexRow]) -> dict[str, str]:
    return {row.image_key: row.uri for row in rows if row.status == "ok"}
