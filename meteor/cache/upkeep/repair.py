"""Repair of a cache: damaged images leave the key index, so that the next build encodes them again."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.calibration import open_codec
from meteor.cache.ledger import ledger_names, read_records, record_of
from meteor.cache.manifest import (
    latest_manifest,
    publish_edit,
    read_keys,
    read_manifest,
    read_quarantine,
    rebuild,
)
from meteor.cache.verify import Problem, find_problems
from meteor.errors import CacheError, CorruptPayloadError, NotFoundError


@dataclass(frozen=True)
class Repair:
    """Result of a repair.

    Attributes:
        cache_uri: URI of the cache.
        checked_version: the version that was the latest.
        version: the version without the damaged images; the checked version if nothing had to change.
        problems: problems of the data files.
        dropped: keys of the images that the next build encodes again.
        notes: problems outside data files, and their treatment.
    """

    cache_uri: str
    checked_version: int
    version: int
    problems: tuple[Problem, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, with problems as lines."""
        return {**vars(self), "problems": [str(problem) for problem in self.problems]}

    def to_text(self) -> str:
        """Return every problem and the next action as lines for people."""
        lines = [*self.notes, *map(str, self.problems)]
        if num_unproven := sum(not problem.proven for problem in self.problems):
            lines.append(
                f"{num_unproven} files could not be read from the store and are kept: repair again when the store answers, "
                "or delete them if they are lost"
            )
        if self.version == self.checked_version:
            lines.append(f"version {self.version}: nothing to change")
        else:
            lines.append(
                f"version {self.version} replaces version {self.checked_version}: {len(self.dropped)} damaged images were "
                "removed" + (", run cache_features to encode them again" if self.dropped else "")
            )
        return "\n".join(lines)


def repair(cache_uri: str, *, on_progress: Callable[[int, int], None] | None = None) -> Repair:
    """Verify the latest version, and publish a version whose key index lacks exactly the damaged images.

    A key index or quarantine table that cannot be read is rebuilt from the ledger. Other processes may write during the
    repair, and a second repair finds nothing to do. Older versions, including pinned ones, do not change.

    Args:
        cache_uri: URI of the cache.
        on_progress: called with the number of finished data files and of all data files.

    Raises:
        CacheError: the cache does not exist, nothing has been committed, or a newer release wrote to it.
        StorageError: the store does not answer.
    """
    cache_uri = storage.absolute(cache_uri)
    codec = open_codec(cache_uri)
    checked_version = latest_manifest(cache_uri)
    if not checked_version:
        raise CacheError(f"{cache_uri} has no committed version yet; run cache_features")
    unreadable = _unreadable_records(cache_uri)
    notes = [f"{error}; the ledger record is not used" for error in unreadable.values()]
    version = checked_version
    if error := _error_of_version(cache_uri, checked_version):
        version = rebuild(cache_uri, checked_version, unreadable=unreadable)
        notes.append(f"version {checked_version} cannot be read ({error}); version {version} is made from the ledger")
    manifest = read_manifest(cache_uri, version)
    keys = read_keys(cache_uri, manifest)
    notes += _files_without_record(cache_uri, keys)
    problems = find_problems(cache_uri, keys, codec, on_progress=on_progress)
    proven = [problem for problem in problems if problem.proven]
    # A damaged record that no version has merged would make every commit fail, so this version marks it as merged.
    if proven or not unreadable.keys() <= set(manifest.records):
        version = publish_edit(
            cache_uri, lambda latest: latest.filter(pc.invert(_is_damaged(latest, proven))), unreadable=unreadable
        )
    dropped = keys.filter(_is_damaged(keys, proven))["image_key"].to_pylist()
    return Repair(cache_uri, checked_version, version, tuple(problems), tuple(dropped), tuple(notes))


def _error_of_version(cache_uri: str, version: int) -> CorruptPayloadError | NotFoundError | None:
    try:
        manifest = read_manifest(cache_uri, version)
        read_keys(cache_uri, manifest)
        read_quarantine(cache_uri, manifest)
    except (CorruptPayloadError, NotFoundError) as error:
        return error
    return None


def _unreadable_records(cache_uri: str) -> dict[str, CorruptPayloadError]:
    contents = read_records(cache_uri, ledger_names(cache_uri))
    return {name: content for name, content in contents.items() if isinstance(content, CorruptPayloadError)}


def _files_without_record(cache_uri: str, keys: pa.Table) -> list[str]:
    """Describe data files without a ledger record: the key index still serves them, but a rebuild would lose them."""
    listed = set(ledger_names(cache_uri))
    return [
        f"{file} has no ledger record; the key index serves it as long as it is intact"
        for file in sorted(pc.unique(keys["file"]).to_pylist())
        if record_of(file) not in listed
    ]


def _is_damaged(keys: pa.Table, problems: Collection[Problem]) -> pa.ChunkedArray:
    """Return which rows have a problem; a row of a damaged image in another file has none."""
    files = pa.array({problem.file for problem in problems if problem.image_key is None}, pa.string())
    images = pa.array({f"{problem.file} {problem.image_key}" for problem in problems}, pa.string())
    places = pc.binary_join_element_wise(keys["file"], keys["image_key"], " ")
    return pc.or_(pc.is_in(keys["file"], value_set=files), pc.is_in(places, value_set=images))
