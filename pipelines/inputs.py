"""What several stages read first: sample files, images' places, the encoder and the cache identity it makes."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import PurePosixPath

from meteor import storage
from meteor.assembly import load_encoder, pixel_settings, question_sets, sample_files, training_files
from meteor.cache import DatasetIndex, FeatureCache, IndexRow
from meteor.cache.disk_tier import DiskTier
from meteor.config import RunSettings, settings_digest
from meteor.data.samples import Sample, SampleProblem, load_samples
from meteor.data.table import IndexedImage
from meteor.errors import SettingsError
from meteor.evaluation.question_set import QuestionSet
from meteor.stages import TrainingStage
from meteor.vision.live import LiveFeatures


@dataclass(frozen=True)
class SampleSet:
    """One annotation file: its samples, the records that cannot be used, and a fingerprint of the file.

    ``weight``: passes over it in an epoch of training.
    """

    name: str
    uri: str
    samples: list[Sample]
    problems: list[SampleProblem]
    digest: str
    weight: float = 1.0

    @cached_property
    def image_names(self) -> set[str]:
        return {name for sample in self.samples for name in sample.images}


def load_set(name: str, uri: str) -> SampleSet:
    """The sample set of a file, which a process reads once: stages, and their parents, ask for it several times."""
    info = storage.stat(uri)
    return replace(_read_set(uri, info.size_bytes, info.etag), name=name)


@lru_cache(maxsize=8)
def _read_set(uri: str, size_bytes: int, etag: str) -> SampleSet:
    samples, problems = load_samples(uri)
    return SampleSet("", uri, samples, problems, hashlib.sha256(storage.read_bytes(uri)).hexdigest())


def load_sets(settings: RunSettings) -> list[SampleSet]:
    """All sample sets of the run; `SettingsError` where it names none."""
    files = [load_set(file.name, file.uri) for file in sample_files(settings) if file.stage is not None]
    return files + [as_samples(one) for one in question_sets(settings)]


def as_samples(questions: QuestionSet) -> SampleSet:
    """What a question set asks."""
    samples = [question.sample for question in questions.questions]
    return SampleSet(questions.name, questions.uri, samples, list(questions.problems), questions.digest)


def load_mixture(settings: RunSettings, stage: TrainingStage) -> list[SampleSet]:
    """What a stage trains on, in an order that depends on the files' content alone.

    Of several files each sample's id begins with its file's name.

    Raises:
        SettingsError: there is none, or the same file twice.
    """
    files = training_files(settings, stage)
    if not files:
        raise SettingsError(f"data.{stage} is not set: name the LLaVA JSON of this stage")
    sets = [replace(load_set(file.name, file.uri), weight=file.weight) for file in files]
    if len(sets) > 1:
        sets = sorted(map(_with_ids_of_its_own, sets), key=lambda one: one.digest)
    for one, other in pairwise(sets):
        if one.digest == other.digest:
            raise SettingsError(
                f"data.{stage}: {one.uri} and {other.uri} are the same file: give one of them the weight"
            )
    return sets


def _with_ids_of_its_own(one: SampleSet) -> SampleSet:
    name = PurePosixPath(one.uri).name
    return replace(
        one,
        samples=[replace(sample, id=f"{name}/{sample.id}") for sample in one.samples],
        problems=[replace(problem, sample_id=f"{name}/{problem.sample_id}") for problem in one.problems],
    )


def mixture_digest(sets: Sequence[SampleSet]) -> str:
    """The file's own where there is one and it weighs 1."""
    if [one.weight for one in sets] == [1]:
        return sets[0].digest
    return settings_digest([[one.digest, one.weight] for one in sets])


def names_of_images(sets: Iterable[SampleSet]) -> set[str]:
    return set().union(*(one.image_names for one in sets))


def indexed_images(index: DatasetIndex, names: Iterable[str]) -> dict[str, IndexedImage]:
    """What the index says about the images of these names; names it does not have are left out."""
    wanted = set(names)
    return {
        row.name: IndexedImage(row.image_key, row.width, row.height, row.reason)
        for row in index.rows()
        if row.name in wanted
    }


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
