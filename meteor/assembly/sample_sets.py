"""Sample sets of a run: the mixture of a stage's files, and the samples of questions."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pyarrow as pa

from meteor.assembly.places import short_names
from meteor.config import settings_digest
from meteor.data.sample_sets import SampleSet
from meteor.errors import SettingsError
from meteor.evaluation.question_set import QuestionSet


def as_samples(questions: QuestionSet) -> SampleSet:
    """Return the samples of a question set."""
    samples = [question.sample for question in questions.questions]
    problems = list(questions.problems)
    return SampleSet.of(questions.name, samples, problems, uri=questions.uri, digest=questions.digest)


def mix(stage: str, sets: Sequence[SampleSet]) -> list[SampleSet]:
    """Order the files of a stage by content; if there are several, put the file's name before each sample's id.

    Raises:
        SettingsError: two files have the same content.
    """
    if len(sets) > 1:
        names = short_names(file.uri for file in sets)
        named = [file.with_prefix(f"{name}/") for name, file in zip(names, sets, strict=True)]
        sets = sorted(named, key=lambda file: file.digest)
    for file, other in pairwise(sets):
        if file.digest == other.digest:
            raise SettingsError(
                f"data.{stage}: {file.uri} and {other.uri} have the same content: remove one and add its weight to the other"
            )
    return list(sets)


def mixture_digest(sets: Sequence[SampleSet]) -> str:
    """Return the digest of a stage's files and weights; a single file of weight 1 keeps its own digest."""
    if [file.weight for file in sets] == [1]:
        return sets[0].digest
    return settings_digest([[file.digest, file.weight] for file in sets])


def distinct_images(sets: Iterable[SampleSet]) -> pa.StringArray:
    """Return the names of the images of all sets; an image of several sets occurs several times."""
    return pa.concat_arrays([pa.array([], pa.string()), *(file.distinct_images for file in sets)])


def names_of_images(sets: Iterable[SampleSet]) -> set[str]:
    """Return the names of the images of all sets."""
    return set(distinct_images(sets).to_pylist())
