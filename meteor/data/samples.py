"""Samples, read from LLaVA's JSON or JSONL: what cannot be used is listed with its reason, never dropped in silence."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meteor.data.records import read_records
from meteor.text.conversation import Conversation, ConversationProblem, Turn, read_conversation


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


def iter_samples(uri: str, *, for_generation: bool = False) -> Iterator[Sample | SampleProblem]:
    """Read an annotation file record by record.

    A record has ``conversations`` and, as it likes, ``id`` (default: its position), ``image`` (a name or a list of
    names; absent, null or "" for text alone) and ``type`` or ``category``. Of records with the same id the second
    becomes ``id#2``, and so on, also where the first cannot be used: ids do not change when a record is repaired.

    Args:
        uri: local path or s3://, ending in ``.json`` (one list) or ``.jsonl`` (one record a line).
        for_generation: the last turn may be a question without its answer.

    Yields:
        For each record, in the order of the file, its sample or why it cannot be used.

    Raises:
        NotFoundError: no such file.
        DataError: the file is not JSON (with the line and column), or not a list of records.
    """
    ids = _UniqueIds()
    for position, record in enumerate(read_records(uri)):
        yield _read_record(record, ids.take(_stated_id(record, position)), for_generation)


def load_samples(uri: str, *, for_generation: bool = False) -> tuple[list[Sample], list[SampleProblem]]:
    """Read a file that is small enough for lists: its samples, and its records that cannot be used; see `iter_samples`."""
    read = list(iter_samples(uri, for_generation=for_generation))
    return [one for one in read if isinstance(one, Sample)], [one for one in read if isinstance(one, SampleProblem)]


def _read_record(record: Any, sample_id: str, for_generation: bool) -> Sample | SampleProblem:
    if not isinstance(record, dict):
        return SampleProblem(sample_id, "bad_record", f"the record is a {type(record).__name__}, not an object")
    images = _image_names(record)
    if images is None:
        message = f"'image' must be a name or a list of names, and is {record['image']!r}"
        return SampleProblem(sample_id, "bad_image_field", message)
    found = read_conversation(record.get("conversations"), num_images=len(images), for_generation=for_generation)
    if isinstance(found, ConversationProblem):
        return SampleProblem(sample_id, found.reason, found.message)
    sample = Sample(sample_id, images, found.turns, _sample_type(record), found.system)
    if not _is_text(sample):
        return SampleProblem(sample_id, "bad_text", "a text holds half of a surrogate pair, which is no character")
    return sample


def _is_text(sample: Sample) -> bool:
    """Whether UTF-8 can hold it: JSON can write half of a surrogate pair, and no tokenizer or table takes one."""
    words = "".join([sample.type, sample.system or "", *sample.images, *(turn.text for turn in sample.turns)])
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    # Half of a surrogate pair, which JSON can write, becomes a question mark.
    return str(position) if stated is None or stated == "" else str(stated).encode(errors="replace").decode()


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
