"""Files of samples that a setting names: one file, all files of a folder, or those that fit a pattern."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from meteor import storage
from meteor.errors import DataError, NotFoundError

FORMS = (".json", ".jsonl", ".parquet", ".tar")
# A folder often has JSON files beside its shards that describe them, so only a pattern or a name chooses those.
_FORMS_OF_SHARDS = (".parquet", ".tar", ".jsonl")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
_PARTS = {"**/": r"(?:(?!\.)[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_MAX_NAMES = 1_000_000
FORMS_ADVICE = (
    "give LLaVA's or chat messages as .json or .jsonl, .parquet files with conversations, messages or texts, or WebDataset "
    "shards (.tar): one file, a folder, or a pattern such as data/train-*.parquet or shards/{00000..00099}.tar"
)


@dataclass(frozen=True)
class DataFiles:
    """Files of one form that hold the samples of one set.

    Attributes:
        uri: path, folder or pattern by which they are named.
        root: URI of the file if it is named itself, else of the folder above all files.
        infos: size and etag of each file, sorted by URI.
    """

    uri: str
    root: str
    infos: tuple[storage.ObjectInfo, ...]

    @property
    def form(self) -> str:
        return PurePosixPath(self.infos[0].uri).suffix

    @property
    def is_one(self) -> bool:
        """Whether a single file is named itself, so that its name is no part of what it holds."""
        return self.root == self.infos[0].uri

    def below(self, info: storage.ObjectInfo) -> str:
        """Return a file's path below the root; "" for the file that is named itself."""
        return info.uri.removeprefix(self.root).lstrip("/")


def find_data_files(uri: str) -> DataFiles:
    """Find the files that a path, folder or pattern names.

    ``*``, ``?`` and ``[..]`` stand for characters within a name, ``**`` for folders, ``{a,b}`` and ``{000..012}`` for each of
    their values. A file whose name is equal to the pattern comes first. In a folder, the files of all folders below count,
    but hidden ones.

    Raises:
        NotFoundError: there is no such file, or one that a pattern without wildcards names is missing.
        DataError: the form is unknown, or the files have several forms.
    """
    uri = storage.absolute(uri)
    if _has_form(uri, FORMS) and storage.exists(uri):
        return DataFiles(uri, uri, (storage.stat(uri),))
    if _WILD.search(uri) or _BRACES.search(uri):
        return _checked(uri, _matching(uri))
    found = storage.list_objects(uri) if _may_be_folder(uri) else []
    if not found:
        storage.stat(uri)
        raise DataError(f"{uri} has no known form: {FORMS_ADVICE}")
    shards = [info for info in found if _has_form(info.uri, _FORMS_OF_SHARDS) and "/." not in info.uri[len(uri) :]]
    return _checked(uri, shards, folder=uri)


def _may_be_folder(uri: str) -> bool:
    return uri.startswith("s3://") or os.path.isdir(uri)


def _has_form(uri: str, forms: tuple[str, ...]) -> bool:
    return PurePosixPath(uri).suffix in forms


def _checked(uri: str, infos: list[storage.ObjectInfo], folder: str = "") -> DataFiles:
    if not infos:
        raise DataError(f"{uri} names no file of samples: {FORMS_ADVICE}")
    forms = sorted({PurePosixPath(info.uri).suffix for info in infos})
    if unknown := [info.uri for info in infos if not _has_form(info.uri, FORMS)]:
        raise DataError(f"{unknown[0]} has no known form: {FORMS_ADVICE}")
    if len(forms) > 1:
        raise DataError(f"{uri} names files of several forms ({', '.join(forms)}): name those of one by a pattern")
    infos = sorted(infos, key=lambda info: info.uri)
    return DataFiles(uri, folder or _fixed_folder(uri), tuple(infos))


def _fixed_folder(pattern: str) -> str:
    """Return the folder in front of the first part of a pattern that is no plain name."""
    head = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return head.rpartition("/")[0]


def _matching(pattern: str) -> list[storage.ObjectInfo]:
    found: dict[str, storage.ObjectInfo] = {}
    plain = []
    by_folder: dict[str, list[re.Pattern[str]]] = {}
    for name in _expanded(pattern):
        if _WILD.search(name):
            by_folder.setdefault(_fixed_folder(name), []).append(_as_regex(name))
        else:
            plain.append(name)
    for name in plain:
        found[name] = storage.stat(name)
    for folder, regexes in by_folder.items():
        if not folder or folder == "s3:/":
            raise NotFoundError(f"{pattern}: a pattern needs a folder or a bucket in front of its first wildcard")
        for info in storage.list_objects(folder):
            if any(regex.fullmatch(info.uri) for regex in regexes):
                found[info.uri] = info
    return list(found.values())


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the pattern with each value of its braces, as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for value in _values(braces[1]):
        yield from _expanded(pattern[: braces.start()] + value + pattern[braces.end() :])


def _values(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= _MAX_NAMES:
        raise DataError(f"{{{inside}}} stands for more than {_MAX_NAMES:,} files: name fewer, or use a wildcard")
    step = 1 if first <= last else -1
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + step, step)]


def _as_regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join(_PARTS.get(part) or _part_as_regex(part) for part in parts), re.DOTALL)


def _part_as_regex(part: str) -> str:
    if not (part.startswith("[") and part.endswith("]")):
        return re.escape(part)
    is_negated = part[1] in "!^"
    characters = part[1 + is_negated : -1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
    return f"[{'^' if is_negated else ''}{characters}]"
