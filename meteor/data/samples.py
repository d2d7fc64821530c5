"""Samples from files of any form; records that cannot be used are listed with a reason, never dropped in silence."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from meteor.data.data_files import DataFiles
from meteor.data.forms import IMAGE_KEYS, image_name, looks_like_media, name_problem, read_dialogue
from meteor.data.parquet_records import read_parquet_records
from meteor.data.records import NameImage, UnreadableRecord, read_records
from meteor.data.tar_records import match_members, read_tar_samples
from meteor.formatting import shorten
from meteor.storage import ObjectInfo
from meteor.text.conversation import Conversation, ConversationProblem, Turn, read_conversation

_LONGEST_SHOWN = 200
# The largest number in the column that counts the images of a turn.
_MAX_IMAGES = (1 << 15) - 1


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
    """Read a JSON file record by record; see `samples_in`. Images inside the file cannot be used."""
    ids = UniqueIds()
    for position, record in enumerate(read_records(uri)):
        yield _sample(_Row(str(position), record), ids, for_generation)


def samples_in(files: DataFiles, prefix: str, *, only: int | None = None) -> Iterator[Sample | SampleProblem]:
    """Read files of any form record by record.

    A record has a dialogue (see `meteor.data.forms`) and optionally ``id``, ``image`` (a name or a list of names; absent, null
    or "" for text alone; ``images``, ``image_path`` and ``image_paths`` mean the same) and ``type`` or ``category``. Without
    ``id`` it is named after its row, or after its key in an archive; behind the file's name if there are several files. If
    several records share an id, the second becomes ``id#2``, and so on. Records that cannot be used are counted too, so that
    ids do not change when they are repaired.

    Args:
        files: files to read.
        prefix: text in front of the names of images inside the files, ending in a slash.
        only: number of the one file to read; None for all. Ids are then unique in this file alone.

    Yields:
        The sample of each record, in the order of the files, or the problem because of which it cannot be used.

    Raises:
        NotFoundError: a file does not exist.
        DataError: a file is damaged as a whole, or holds no samples.
    """
    ids = UniqueIds()
    for number in range(len(files.infos)) if only is None else [only]:
        for row in _rows(files, files.infos[number], prefix):
            yield _sample(row, ids, for_generation=False)


class _Row(NamedTuple):
    """A record with the id for the case that it states none.

    Attributes:
        id: id of the record.
        record: the record as JSON values.
        members: (name in the archive, name of the image) of images that come with the record.
    """

    id: str
    record: Any
    members: tuple[tuple[str, str], ...] = ()


def _rows(files: DataFiles, info: ObjectInfo, prefix: str) -> Iterator[_Row]:
    below = files.below(info)
    stem = f"{below.rpartition('.')[0]}/" if below else ""

    def name_image(fragment: str) -> str:
        return f"{prefix}{below}{fragment}"

    if files.form == ".tar":
        for found in read_tar_samples(info.uri, name_image):
            yield _Row(stem + found.key, found.record, found.images)
    else:
        for position, record in enumerate(_records(info.uri, files.form, name_image)):
            yield _Row(f"{stem}{position}", record)


def _records(uri: str, form: str, name_image: NameImage) -> Iterator[Any]:
    if form == ".parquet":
        return read_parquet_records(uri, name_image)
    return read_records(uri, name_image=name_image)


def _sample(row: _Row, ids: "UniqueIds", for_generation: bool) -> Sample | SampleProblem:
    sample_id = row.id
    try:
        sample_id = ids.take(_stated_id(row.record, row.id))
        return _read_record(row.record, sample_id, for_generation, row.members)
    except Exception as error:  # noqa: BLE001  (a record may hold anything, and must not cost the others)
        return failed(sample_id, error)


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


def _read_record(
    record: Any, sample_id: str, for_generation: bool, members: tuple[tuple[str, str], ...] = ()
) -> Sample | SampleProblem:
    if isinstance(record, UnreadableRecord):
        return SampleProblem(sample_id, "bad_record", record.message)
    if not isinstance(record, dict):
        return SampleProblem(sample_id, "bad_record", f"the record is a {type(record).__name__}, not an object")
    named = _image_names(record)
    if isinstance(named, str):
        return SampleProblem(sample_id, "bad_image_field", named)
    dialogue = read_dialogue(record, named, [image for _, image in members])
    if isinstance(dialogue, ConversationProblem):
        return SampleProblem(sample_id, dialogue.reason, dialogue.message)
    images = _usable_names(dialogue.images, members)
    if isinstance(images, str):
        return SampleProblem(sample_id, "bad_image_field", images)
    found = read_conversation(dialogue.turns, num_images=len(images), for_generation=for_generation)
    if isinstance(found, ConversationProblem):
        keys = [key for key in IMAGE_KEYS[1:] if record.get(key)]
        return SampleProblem(sample_id, found.reason, found.message + (f" (in {keys[0]!r})" if keys else ""))
    sample = Sample(sample_id, images, found.turns, _sample_type(record), found.system)
    if not _is_text(sample):
        return SampleProblem(sample_id, "bad_text", "a text contains half of a surrogate pair, which is no character")
    return sample


def _usable_names(names: tuple[str, ...], members: tuple[tuple[str, str], ...]) -> tuple[str, ...] | str:
    """Return the names of images as the roots resolve them, or what is wrong with them."""
    if len(names) > _MAX_IMAGES:
        return f"the dialogue shows {len(names):,} images, and a record may show {_MAX_IMAGES:,}"
    if members:
        matched = match_members(names, members)
        if isinstance(matched, str):
            return matched
        names = matched
    return next(filter(None, map(name_problem, names)), names)


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
    given = [key for key in IMAGE_KEYS if record.get(key) not in (None, "", [])]
    if not given:
        # A record whose image is not read would be trained on as text alone.
        unread = [key for key, value in record.items() if looks_like_media(key) and _may_be_media(value)]
        return f"{unread[0]!r} is not read: name images under 'image'" if unread else ()
    if len(given) > 1 and any(record[key] != record[given[0]] for key in given):
        return f"images are named under {' and '.join(map(repr, given))}, which differ: keep one"
    image = record[given[0]]
    values = image if isinstance(image, list) else [image]
    if len(values) > _MAX_IMAGES:
        return f"{given[0]!r} names {len(values):,} images, and a record may name {_MAX_IMAGES:,}"
    names = tuple(name for name in map(image_name, values) if name is not None)
    if len(names) == len(values):
        return names
    return f"{given[0]!r} must be a name or a list of names, and is {shorten(repr(image), _LONGEST_SHOWN)}"


def _may_be_media(value: Any) -> bool:
    """Return whether a value can name media; a list of numbers, such as a rating, cannot."""
    if isinstance(value, list):
        return any(not isinstance(item, int | float | None) for item in value)
    return isinstance(value, str) and bool(value)


def _sample_type(record: dict[str, Any]) -> str:
    return str(record.get("type") or record.get("category") or "")


def _stated_id(record: Any, default: str) -> str:
    stated = record.get("id") if isinstance(record, dict) else None
    # Half of a surrogate pair, which JSON allows, becomes a question mark.
    return default if stated is None or stated == "" else str(stated).encode(errors="replace").decode()


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
