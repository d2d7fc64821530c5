"""Samples from LLaVA's JSON or JSONL; records that cannot be used are listed with a reason, never dropped in silence."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meteor.data.records import UnreadableRecord, read_records
from meteor.formatting import shorten
from meteor.text.conversation import Conversation, ConversationProblem, Turn, read_conversation

_LONGEST_SHOWN = 200
# The largest number in the column that counts the images of a turn.
_MAX_IMAGES = (1 << 15) - 1
# The key of LLaVA's files, and those of LLaMA-Factory, ms-swift and others.
_IMAGE_KEYS = ("image", "images", "image_path", "image_paths")
# Keys that look like images or other media; only those above are read.
_MEDIA = re.compile(r"image|img|picture|photo|video|audio|visual", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """One record of an annotation file.

    Attributes:
        id: the sample's id, unique in its file.
        images: names of the images, relative to the configured roots or absolute, in the order of the placeholders.
        turns: the dialogue.
        type: category by which scores are grouped; "" if the record has none.
        system: system prompt that replaces the template's, or None.
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
        sample_id: the id that a sample of this record would have.
        reason: a short stable code, for example ``"image_without_placeholder"``.
        message: description of the problem.
    """

    sample_id: str
    reason: str
    message: str


def iter_samples(uri: str, *, for_generation: bool = False) -> Iterator[Sample | SampleProblem]:
    """Read an annotation file record by record.

    A record has ``conversations`` and optionally ``id`` (default: its position), ``image`` (a name or a list of names;
    absent, null or "" for text alone; ``images``, ``image_path`` and ``image_paths`` mean the same) and ``type`` or
    ``category``. If several records share an id, the second becomes ``id#2``, and so on. Records that cannot be used are
    counted too, so that ids do not change when they are repaired.

    Args:
        uri: local path or s3://, ending in ``.json`` (one list) or ``.jsonl`` (one record per line).
        for_generation: allow a last turn that is a question without its answer.

    Yields:
        The sample of each record, in the order of the file, or the problem because of which it cannot be used.

    Raises:
        NotFoundError: the file does not exist.
        DataError: the file is not JSON (with the line and column), or not a list of records.
    """
    ids = UniqueIds()
    for position, record in enumerate(read_records(uri)):
        sample_id = str(position)
        try:
            sample_id = ids.take(_stated_id(record, position))
            found = _read_record(record, sample_id, for_generation)
        except Exception as error:  # noqa: BLE001  (a record may hold anything, and must not cost the others)
            found = failed(sample_id, error)
        yield found


def failed(sample_id: str, error: BaseException) -> SampleProblem:
    """Make the problem of a record from an error that nobody foresaw, such as a lack of memory."""
    return SampleProblem(sample_id, "failed", describe(error))


def describe(error: BaseException) -> str:
    """Describe an unforeseen error on one line."""
    return f"{type(error).__name__}: {shorten(' '.join(str(error).split()), _LONGEST_SHOWN)}"


def load_samples(uri: str, *, for_generation: bool = False) -> tuple[list[Sample], list[SampleProblem]]:
    """Read a file that fits into memory: its samples, and the records that cannot be used; see `iter_samples`."""
    samples: list[Sample] = []
    problems: list[SampleProblem] = []
    for record in iter_samples(uri, for_generation=for_generation):
        if isinstance(record, Sample):
            samples.append(record)
        else:
            problems.append(record)
    return samples, problems


def _read_record(record: Any, sample_id: str, for_generation: bool) -> Sample | SampleProblem:
    if isinstance(record, UnreadableRecord):
        return SampleProblem(sample_id, "bad_record", record.message)
    if not isinstance(record, dict):
        return SampleProblem(sample_id, "bad_record", f"the record is a {type(record).__name__}, not an object")
    images = _image_names(record)
    if isinstance(images, str):
        return SampleProblem(sample_id, "bad_image_field", images)
    found = read_conversation(record.get("conversations"), num_images=len(images), for_generation=for_generation)
    if isinstance(found, ConversationProblem):
        named = [key for key in _IMAGE_KEYS[1:] if record.get(key)]
        return SampleProblem(sample_id, found.reason, found.message + (f" (in {named[0]!r})" if named else ""))
    sample = Sample(sample_id, images, found.turns, _sample_type(record), found.system)
    if not _is_text(sample):
        return SampleProblem(sample_id, "bad_text", "a text contains half of a surrogate pair, which is no character")
    return sample


def _is_text(sample: Sample) -> bool:
    """Return whether UTF-8 can encode the sample: JSON allows half of a surrogate pair, tokenizers and tables do not."""
    words = "".join([sample.type, sample.system or "", *sample.images, *(turn.text for turn in sample.turns)])
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_names(record: dict[str, Any]) -> tuple[str, ...] | str:
    """Return the names of a record's images, or what is wrong with them."""
    given = [key for key in _IMAGE_KEYS if record.get(key) not in (None, "", [])]
    if not given:
        # A record whose image is not read would be trained on as text alone.
        unread = [
            key for key, value in record.items() if _MEDIA.search(key) and isinstance(value, str | list) and value
        ]
        return f"{unread[0]!r} is not read: name images under 'image'" if unread else ()
    if len(given) > 1 and any(record[key] != record[given[0]] for key in given):
        return f"images are named under {' and '.join(map(repr, given))}, which differ: keep one"
    image = record[given[0]]
    names = image if isinstance(image, list) else [image]
    if len(names) > _MAX_IMAGES:
        return f"{given[0]!r} names {len(names):,} images, and a record may name {_MAX_IMAGES:,}"
    if all(isinstance(name, str) and name for name in names):
        return tuple(names)
    return f"{given[0]!r} must be a name or a list of names, and is {shorten(repr(image), _LONGEST_SHOWN)}"


def _sample_type(record: dict[str, Any]) -> str:
    return str(record.get("type") or record.get("category") or "")


def _stated_id(record: Any, position: int) -> str:
    stated = record.get("id") if isinstance(record, dict) else None
    # Half of a surrogate pair, which JSON allows, becomes a question mark.
    return str(position) if stated is None or stated == "" else str(stated).encode(errors="replace").decode()


class UniqueIds:
    """Ids of the records of a file so far; repeated ids get a number."""

    def __init__(self) -> None:
        self._num_uses: Counter[str] = Counter()
        self._taken: set[str] = set()

    def take(self, stated: str) -> str:
        """Return the id of the next record, which states this id."""
        self._num_uses[stated] += 1
        unique = stated if self._num_uses[stated] == 1 else f"{stated}#{self._num_uses[stated]}"
        # A file may already contain an id like "a#2".
        while unique in self._taken:
            self._num_uses[stated] += 1
            unique = f"{stated}#{self._num_uses[stated]}"
        self._taken.add(unique)
        return unique
