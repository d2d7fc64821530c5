"""Sample sets of a run: the files of a stage as one mixture, and the samples behind questions."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

import pyarrow as pa

from meteor.config import settings_digest
from meteor.data.sample_sets import SampleSet
from meteor.errors import SettingsError
from meteor.evaluation.question_set import QuestionSet


def as_samples(questions: QuestionSet) -> SampleSet:
    """The samples behind a question set's questions."""
    samples = [question.sample for question in questions.questions]
    problems = list(questions.problems)
    return SampleSet.of(questions.name, samples, problems, uri=questions.uri, digest=questions.digest)


def mix(stage: str, sets: Sequence[SampleSet]) -> list[SampleSet]:
    """Order the files of a stage by content. If there are several, each sample's id begins with its file's name.

    Raises:
        SettingsError: two files have the same content.
    """
    if len(sets) > 1:
        named = [file.with_prefix(f"{PurePosixPath(file.uri).name}/") for file in sets]
        sets = sorted(named, key=lambda file: file.digest)
    for file, other in pairwise(sets):
        if file.digest == other.digest:
            raise SettingsError(
                f"data.{stage}: {file.uri} and {other.uri} are the same file: give one of them the weight"
            )
    return list(sets)


def mixture_digest(sets: Sequence[SampleSet]) -> str:
    """Digest of a stage's files and weights; a single file of weight 1 keeps its own digest."""
    if [file.weight for file in sets] == [1]:
        return sets[0].digest
    return settings_digest([[file.digest, file.weight] for file in sets])


def distinct_images(sets: Iterable[SampleSet]) -> pa.StringArray:
    """Names of the images of all sets, each at least once."""
    return pa.concat_arrays([pa.array([], pa.string()), *(file.distinct_images for file in sets)])


def names_of_images(sets: Iterable[SampleSet]) -> set[str]:
    """Names of the images of all sets."""
    return set(distinct_images(sets).to_pylist())
