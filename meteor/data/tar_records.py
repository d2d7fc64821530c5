"""Samples of WebDataset shards as records: members that follow each other and share a key belong to one sample."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from meteor.constants import IMAGE_PLACEHOLDER
from meteor.data.forms import DIALOGUE_KEYS
from meteor.data.records import NameImage, UnreadableRecord
from meteor.errors import DataError, StorageError
from meteor.formatting import shorten
from meteor.image.inside import member_fragment
from meteor.storage.files import open_file

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "img",
)  # fmt: skip
TEXT_SUFFIXES = ("json", "txt", "caption")
_MAX_TEXT_BYTES = 64 << 20
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        name: path in the archive.
        start: offset of the content in bytes.
        size_bytes: size of the content.
        text: content of a member that holds text, else None.
    """

    name: str
    start: int
    size_bytes: int
    text: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Key of the sample: the path up to the first dot of the file's name."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def suffix(self) -> str:
        """Letters behind the last dot, in lower case."""
        return PurePosixPath(self.name).suffix[1:].lower()


@dataclass(frozen=True)
class TarSample:
    """The record of a sample with the images that came with it.

    Attributes:
        key: key of the sample.
        record: the record as JSON values, or why it cannot be read.
        images: (name in the archive, name of the image) of each image.
    """

    key: str
    record: Any
    images: tuple[tuple[str, str], ...] = ()


def read_tar_samples(uri: str, name_image: NameImage) -> Iterator[TarSample]:
    """Read the samples of a shard; the contents of its images are passed over.

    A sample has ``.json`` with a record, or ``.txt`` with a caption, or both, as img2dataset writes them; and images. A
    damaged or cut archive ends with a sample that says so.

    Args:
        uri: local path or s3://.
        name_image: function from the fragment of an image's URI to the image's name.

    Raises:
        DataError: the file is no tar archive, or a compressed one.
    """
    problem: list[str] = []
    for key, members in groupby(read_members(uri, problem), key=lambda member: member.key):
        group = list(members)
        images = tuple(
            (member.name, name_image(member_fragment(member.start, member.size_bytes)))
            for member in group
            if member.suffix in IMAGE_SUFFIXES
        )
        if images or any(member.suffix in TEXT_SUFFIXES for member in group):
            yield TarSample(key, _record(group, len(images)), images)
    if problem:
        yield TarSample("end", UnreadableRecord(problem[0]))


def read_members(uri: str, problem: list[str]) -> Iterator[Member]:
    """Yield the files of an archive, with the content of those that hold text.

    Args:
        uri: local path or s3://.
        problem: list to which a sentence is added if the archive is damaged or cut short.

    Raises:
        DataError: the file is no tar archive, or a compressed one.
    """
    with open_file(uri) as file:
        try:
            archive = tarfile.TarFile(fileobj=file, errors="replace")
        except tarfile.TarError as error:
            raise DataError(f"{uri} is no tar archive ({error}): shards must be complete and not compressed") from error
        size_bytes, end = file.size(), 0
        try:
            while (member := archive.next()) is not None:
                # The archive would keep every member.
                archive.members = []  # type: ignore[attr-defined]
                end = member.offset_data + member.size
                if end > size_bytes:
                    break
                if member.isreg():
                    yield _member(file, member, archive)
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001  (the headers may hold anything, and the samples before are good)
            problem.append(
                f"{uri} is damaged near byte {archive.offset}, and the samples behind are lost ({_shown(error)})"
            )
            return
        file.seek(min(archive.offset, size_bytes))
        if end > size_bytes or file.read(_BLOCK) != bytes(_BLOCK):
            problem.append(
                f"{uri} is cut short or damaged near byte {min(archive.offset, size_bytes)}: it lacks the end of an archive, "
                "and samples may be lost; copy or download it again"
            )


def _member(file: Any, member: tarfile.TarInfo, archive: tarfile.TarFile) -> Member:
    text = None
    if PurePosixPath(member.name).suffix[1:].lower() in TEXT_SUFFIXES:
        file.seek(member.offset_data)
        text = file.read(min(member.size, _MAX_TEXT_BYTES + 1))
    # Names that are no UTF-8 have other characters in their place.
    return Member(member.name.encode(errors="replace").decode(), member.offset_data, member.size, text)


def _record(members: list[Member], num_images: int) -> Any:
    texts = {member.suffix: member.text for member in members if member.text is not None}
    if any(len(text) > _MAX_TEXT_BYTES for text in texts.values()):
        return UnreadableRecord(f"a text has more than {_MAX_TEXT_BYTES:,} bytes")
    try:
        record = json.loads(texts["json"]) if "json" in texts else {}
    except (ValueError, RecursionError) as error:
        return UnreadableRecord(f"its .json cannot be read ({_shown(error)})")
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict) or any(record.get(key) not in (None, []) for key in DIALOGUE_KEYS):
        return record
    caption = texts.get("txt", texts.get("caption"))
    if caption is None:
        return record
    try:
        answer = caption.decode().strip()
    except UnicodeDecodeError as error:
        return UnreadableRecord(f"its text is no UTF-8 ({_shown(error)})")
    question = "\n".join([IMAGE_PLACEHOLDER] * num_images)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    # Other fields describe the download of the image.
    return {"id": record.get("id"), "conversations": turns}


def match_members(names: tuple[str, ...], images: tuple[tuple[str, str], ...]) -> tuple[str, ...] | str:
    """Return the images that names in a record stand for, or why they stand for none.

    A name is that of a member: its path, its file's name, or its part behind the key. Names of other places stand for the
    members in their order, if there are equally many. Names in a sample without images are those of files elsewhere.

    Args:
        names: names of images as the record writes them.
        images: (name in the archive, name of the image) of each image of the sample.
    """
    known: dict[str, str] = {}
    for member, image in images:
        base = member.rpartition("/")[2]
        for spelling in (member, base, base.partition(".")[2]):
            known.setdefault(spelling, image)
    own = {image for _, image in images}
    if not images or all(name in own for name in names):
        return names
    if all(name in known or name in own for name in names):
        return tuple(known.get(name, name) for name in names)
    if len(names) == len(images):
        return tuple(image for _, image in images)
    return f"the record names {len(names):,} images, and {len(images):,} come with it in the archive"


def _shown(error: Exception) -> str:
    return shorten(" ".join(f"{type(error).__name__}: {error}".split()), _LONGEST_SHOWN)
