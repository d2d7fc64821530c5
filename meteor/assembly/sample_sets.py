"""Sample sets: annotation files as they were read, and mixtures of several files."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath

from meteor import storage
from meteor.config import settings_digest
from meteor.data.samples import Sample, SampleProblem, load_samples
from meteor.errors import SettingsError
from meteor.evaluation.question_set import QuestionSet


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
    """Read an annotation file; errors as `meteor.data.samples.load_samples`."""
    samples, problems = load_samples(uri)
    return SampleSet(name, uri, samples, problems, hashlib.sha256(storage.read_bytes(uri)).hexdigest())


def as_samples(questions: QuestionSet) -> SampleSet:
    """The samples behind a question set's questions."""
    samples = [question.sample for question in questions.questions]
    return SampleSet(questions.name, questions.uri, samples, list(questions.problems), questions.digest)


def mix(stage: str, sets: Sequence[SampleSet]) -> list[SampleSet]:
    """Order the files of a stage by content. If there are several, each sample's id begins with its file's name.

    Raises:
        SettingsError: two files have the same content.
    """
    if len(sets) > 1:
        sets = sorted(map(_with_unique_ids, sets), key=lambda file: file.digest)
    for file, other in pairwise(sets):
        if file.digest == other.digest:
            raise SettingsError(
                f"data.{stage}: {file.uri} and {other.uri} are the same file: give one of them the weight"
            )
    return list(sets)


def _with_unique_ids(file: SampleSet) -> SampleSet:
    name = PurePosixPath(file.uri).name
    return replace(
        file,
        samples=[replace(sample, id=f"{name}/{sample.id}") for sample in file.samples],
        problems=[replace(problem, sample_id=f"{name}/{problem.sample_id}") for problem in file.problems],
    )


def mixture_digest(sets: Sequence[SampleSet]) -> str:
    """Digest of a stage's files and weights; a single file of weight 1 keeps its own digest."""
    if [file.weight for file in sets] == [1]:
        return sets[0].digest
    return settings_digest([[file.digest, file.weight] for file in sets])


def names_of_images(sets: Iterable[SampleSet]) -> set[str]:
    return set().union(*(file.image_names for file in sets))
