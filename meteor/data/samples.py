"""Samples, read from LLaVA's JSON or JSONL: what cannot be used is listed with its reason, never dropped in silence."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meteor import storage
from meteor.errors import DataError
from meteor.text.conversation import Conversation, Turn, find_problem, parse_conversation


@dataclass(frozen=True)
class Sample:
    """One record of an annotation file.

    Attributes:
        id: unique in its file.
        images: names of the images, relative to the configured roots or absolute, in the order of the placeholders.
        turns: the dialogue.
        type: what scores are grouped by; "" if the record says nothing.
        system: system prompt in place of the template's own, or None.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    type: str = ""
    system: str | None = None

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.turns, self.system)


@dataclass(frozen=True)
class SampleProblem:
    """A record that cannot be used.

    Attributes:
        sample_id: its id, as ``Sample.id`` would be.
        reason: a short stable code, for example ``"image_without_placeholder"``.
        message: what is wrong.
    """

    sample_id: str
    reason: str
    message: str


def load_samples(uri: str, *, for_generation: bool = False) -> tuple[list[Sample], list[SampleProblem]]:
    """Read an annotation file.

    A record has ``conversations`` and, as it likes, ``id`` (default: its position), ``image`` (a name or a list of
    names; absent, null or "" for text alone) and ``type`` or ``category``. Of records with the same id the second
    becomes ``id#2``, and so on, also where the first cannot be used: ids do not change when a record is repaired.

    Args:
        uri: local path or s3://, ending in ``.json`` (one list) or ``.jsonl`` (one record a line).
        for_generation: the last turn may be a question without its answer.

    Returns:
        The samples in the order of the file, and the records that cannot be used.

    Raises:
        NotFoundError: no such file.
        DataError: the file is not JSON (with the line and column), or not a list of records.
    """
    samples: list[Sample] = []
    problems: list[SampleProblem] = []
    ids = _UniqueIds()
    for position, record in enumerate(read_records(uri)):
        sample_id = ids.take(_stated_id(record, position))
        sample = _read_record(record, sample_id, for_generation)
        if isinstance(sample, Sample):
            samples.append(sample)
        else:
            problems.append(sample)
    return samples, problems


def read_records(uri: str) -> Iterator[Any]:
    """What a ``.json`` (one list) or ``.jsonl`` (one record a line) file holds; errors as `load_samples`'s."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not UTF-8 text ({error}): is it an annotation file?") from error
    if uri.endswith(".jsonl"):
        # Not splitlines(): JSON texts may hold other line separators (U+2028) unescaped.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parse(line, uri, first_line=number)
        return
    if not uri.endswith(".json"):
        raise DataError(f"{uri} is neither .json nor .jsonl: give LLaVA's annotation file in one of these forms.")
    records = _parse(text, uri, first_line=1)
    if not isinstance(records, list):
        raise DataError(
            f"{uri} holds a {type(records).__name__}, not a list of records: give LLaVA's form, or .jsonl with one "
            f"record a line."
        )
    yield from records


def _parse(text: str, uri: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{uri}, line {line}, column {error.colno}: not valid JSON ({error.msg}).") from error


def _read_record(record: Any, sample_id: str, for_generation: bool) -> Sample | SampleProblem:
    if not isinstance(record, dict):
        return SampleProblem(sample_id, "bad_record", f"the record is a {type(record).__name__}, not an object")
    images = _image_names(record)
    if images is None:
        message = f"'image' must be a name or a list of names, and is {record['image']!r}"
        return SampleProblem(sample_id, "bad_image_field", message)
    turns = record.get("conversations")
    problem = find_problem(turns, num_images=len(images), for_generation=for_generation)
    if problem is not None:
        return SampleProblem(sample_id, problem.reason, problem.message)
    conversation = parse_conversation(turns, num_images=len(images), sample_id=sample_id, for_generation=for_generation)
    return Sample(sample_id, images, conversation.turns, _sample_type(record), conversation.system)


def _image_names(record: dict[str, Any]) -> tuple[str, ...] | None:
    image = record.get("image")
    if image is None or image == "":
        return ()
    names = image if isinstance(image, list) else [image]
    return tuple(names) if all(isinstance(name, str) and name for name in names) else None


def _sample_type(record: dict[str, Any]) -> str:
    return str(record.get("type") or record.get("category") or "")


def _stated_id(record: Any, position: int) -> str:
    stated = record.get("id") if isinstance(record, dict) else None
    return str(position) if stated is None or stated == "" else str(stated)


class _UniqueIds:
    def __init__(self) -> None:
        self._num_uses: Counter[str] = Counter()
        self._taken: set[str] = set()

    def take(self, stated: str) -> str:
        self._num_uses[stated] += 1
        unique = stated if self._num_uses[stated] == 1 else f"{stated}#{self._num_uses[stated]}"
        while unique in self._taken:
            self._num_uses[stated] += 1
            unique = f"{stated}#{self._num_uses[stated]}"
        self._taken.add(unique)
        return unique
