"""Conversion of samples of any form to LLaVA's JSON, with the images that lie inside files as files of their own."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from meteor import storage
from meteor.checksums import read_checked_json, write_checked_json
from meteor.constants import IMAGE_PLACEHOLDER
from meteor.data.data_files import DataFiles, find_data_files
from meteor.data.image_problems import image_problems
from meteor.data.roots import resolve_image
from meteor.data.samples import Sample, SampleProblem, samples_in
from meteor.errors import BadImageError, DamagedError, NotFoundError
from meteor.image.decode import image_suffix
from meteor.image.files import read_image_file
from meteor.storage.files import new_file

ANNOTATIONS = "samples.json"
IMAGES = "images"
_PARTS = "parts"
_PREFIX = "@/"
_VERSION = 1
_BLOCK_BYTES = 16 << 20


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        uri: URI of LLaVA's JSON.
        images: folder of the images that were inside files, the root of their names.
        num_samples: samples that were written.
        num_images: images inside files, counted for each sample that shows them.
        num_kept: files that an earlier start had converted.
        problems: records that are left out.
    """

    uri: str
    images: str
    num_samples: int = 0
    num_images: int = 0
    num_kept: int = 0
    problems: list[SampleProblem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**vars(self), "problems": [vars(problem) for problem in self.problems]}


def convert(uri: str, target: str, *, on_file: Callable[[int, int], None] | None = None) -> Conversion:
    """Write the samples of files of any form as LLaVA's JSON.

    Images inside files become files below ``images/``, named by the sha256 of their bytes; names of other images stay. A start
    after a stop goes on behind the last file that was finished; images that are there already are not written again. The
    annotation file appears when everything else is complete.

    Args:
        uri: path, folder or pattern of the files (see `meteor.data.data_files`).
        target: local or s3:// folder.
        on_file: called with (files done, files in all).

    Raises:
        NotFoundError: a file does not exist.
        DataError: the form of the files is unknown, or one is damaged as a whole.
    """
    files = find_data_files(uri)
    result = Conversion(storage.join(target, ANNOTATIONS), storage.join(target, IMAGES))
    parts = []
    for number, info in enumerate(files.infos):
        part = storage.join(target, _PARTS, _part_name(files, info))
        kept = _finished(part)
        counts = kept or _write_part(files, number, part, result.images)
        result.num_kept += kept is not None
        result.num_samples += counts["num_samples"]
        result.num_images += counts["num_images"]
        result.problems += [SampleProblem(**problem) for problem in counts["problems"]]
        parts.append(part)
        if on_file is not None:
            on_file(number + 1, len(files.infos))
    _join(parts, result.uri)
    for part in parts:
        storage.delete(_counts_uri(part))
        storage.delete(part)
    storage.delete_empty_folders(storage.join(target, _PARTS))
    return result


def _part_name(files: DataFiles, info: storage.ObjectInfo) -> str:
    """Return a name that another version of the file does not have."""
    state = [_VERSION, files.root, files.below(info), info.size_bytes, info.etag]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _finished(part: str) -> dict[str, Any] | None:
    """Return the counts of a finished part, else None."""
    try:
        return read_checked_json(_counts_uri(part))
    except (NotFoundError, DamagedError):
        return None


def _counts_uri(part: str) -> str:
    return f"{part}.counts.json"


def _write_part(files: DataFiles, number: int, part: str, images: str) -> dict[str, Any]:
    writer = _ImageWriter({_PREFIX: files.root}, images)
    counts: dict[str, Any] = {"num_samples": 0, "num_images": 0, "problems": []}
    with new_file(part) as path, open(path, "w", encoding="utf-8") as text:
        for found in samples_in(files, _PREFIX, only=number):
            if isinstance(found, Sample):
                found = writer.with_files(found)
            if isinstance(found, SampleProblem):
                counts["problems"].append(vars(found))
                continue
            line = json.dumps(_as_record(found), ensure_ascii=False)
            text.write(f",\n{line}" if counts["num_samples"] else line)
            counts["num_samples"] += 1
        counts["num_images"] = writer.num_images
    # Written last: its existence means that the part is complete.
    write_checked_json(_counts_uri(part), counts)
    return counts


class _ImageWriter:
    """Writes images that lie inside files as files of their own."""

    def __init__(self, roots: dict[str, str], folder: str) -> None:
        self._roots, self._folder = roots, folder
        self._written: set[str] = set()
        self.num_images = 0

    def with_files(self, sample: Sample) -> Sample | SampleProblem:
        """Return the sample with names of files in place of images inside files; a problem if one cannot be read."""
        try:
            images = tuple(self._write(name) if name.startswith(_PREFIX) else name for name in sample.images)
        except BadImageError as error:
            return SampleProblem(sample.id, error.reason, str(error))
        return replace(sample, images=images)

    def _write(self, name: str) -> str:
        uri = resolve_image(name, self._roots)
        with image_problems(uri):
            data = read_image_file(uri)
            if not data:
                raise BadImageError("empty", f"{uri} has 0 bytes")
        digest = hashlib.sha256(data).hexdigest()
        file = f"{digest[:2]}/{digest}{image_suffix(data)}"
        target = storage.join_below(self._folder, file)
        if digest not in self._written and not _has_size(target, len(data)):
            storage.write_bytes(target, data)
        self._written.add(digest)
        self.num_images += 1
        return file


def _has_size(uri: str, size_bytes: int) -> bool:
    try:
        return storage.stat(uri).size_bytes == size_bytes
    except NotFoundError:
        return False


def _as_record(sample: Sample) -> dict[str, Any]:
    """Return a sample as a record of LLaVA's."""
    turns = [{"from": "system", "value": sample.system}] if sample.system is not None else []
    turns += [
        {"from": turn.role, "value": f"{IMAGE_PLACEHOLDER}\n" * turn.num_images + turn.text} for turn in sample.turns
    ]
    shown = {"image": sample.images[0] if len(sample.images) == 1 else list(sample.images)} if sample.images else {}
    kind = {"type": sample.type} if sample.type else {}
    return {"id": sample.id, **shown, "conversations": turns, **kind}


def _join(parts: list[str], target: str) -> None:
    with new_file(target) as path, open(path, "wb") as whole:
        whole.write(b"[")
        separator = b"\n"
        for part in parts:
            size_bytes = storage.stat(part).size_bytes
            for start in range(0, size_bytes, _BLOCK_BYTES):
                whole.write(separator if not start else b"")
                whole.write(storage.read_range(part, start, min(_BLOCK_BYTES, size_bytes - start)))
            separator = b",\n" if size_bytes else separator
        whole.write(b"\n]\n")
