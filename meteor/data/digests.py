"""Digests of data files: of everything but the images inside them, which the dataset index knows by content."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from meteor import storage
from meteor.checksums import read_checked_json, write_checked_json
from meteor.data.data_files import DataFiles
from meteor.data.parquet_records import open_records, text_columns
from meteor.data.tar_records import read_members
from meteor.errors import DamagedError, NotFoundError

# Bytes per read while a file is hashed: few requests to S3, and little memory.
_BLOCK_BYTES = 16 << 20
_FOOTER_END_BYTES = 8
_NUM_THREADS = 8


def digest_of(files: DataFiles, folder: str) -> str:
    """Return a digest of the files' texts and names; a file with unchanged size and etag is not read again.

    Args:
        files: files of a sample set.
        folder: local or s3:// folder that keeps the digests of files.

    Returns:
        The sha256 of the file, if it is a single JSON file; else that of the names and the digests of all files.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = list(pool.map(lambda info: _known_digest(info, files.form, folder), files.infos))
    if files.is_one and files.form in (".json", ".jsonl"):
        return digests[0]
    content = [[files.below(info), digest] for info, digest in zip(files.infos, digests, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _known_digest(info: storage.ObjectInfo, form: str, folder: str) -> str:
    known = storage.join(folder, "files", f"{hashlib.sha256(info.uri.encode()).hexdigest()}.json")
    state = {"uri": info.uri, "size_bytes": info.size_bytes, "etag": info.etag}
    try:
        held = read_checked_json(known)
    except (NotFoundError, DamagedError):
        held = {}
    if {key: held.get(key) for key in state} == state:
        return held["digest"]
    digest = file_digest(info.uri, form)
    write_checked_json(known, {**state, "digest": digest})
    return digest


def file_digest(uri: str, form: str) -> str:
    """Return the sha256 of a file's bytes, without the contents of images in Parquet and tar."""
    digest = hashlib.sha256()
    for part in _PARTS.get(form, _whole)(uri):
        digest.update(part)
    return digest.hexdigest()


def _whole(uri: str) -> Iterator[bytes]:
    return _blocks(uri, 0, storage.stat(uri).size_bytes)


def _parquet(uri: str) -> Iterator[bytes]:
    """Yield the footer, which holds the places and sizes of all pages, and the pages of the columns of text."""
    file = open_records(uri)
    size_bytes = storage.stat(uri).size_bytes
    end = storage.read_range(uri, size_bytes - _FOOTER_END_BYTES, _FOOTER_END_BYTES)
    footer_bytes = int.from_bytes(end[:4], "little") + _FOOTER_END_BYTES
    yield from _blocks(uri, size_bytes - footer_bytes, footer_bytes)
    columns = text_columns(file)
    text = {*columns.text, *columns.bytes_of}
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        for chunk in map(metadata.column, range(metadata.num_columns)):
            if chunk.path_in_schema in text:
                starts = [chunk.data_page_offset]
                starts += [chunk.dictionary_page_offset] if chunk.has_dictionary_page else []
                yield from _blocks(uri, min(starts), chunk.total_compressed_size)


def _tar(uri: str) -> Iterator[bytes]:
    problem: list[str] = []
    for member in read_members(uri, problem):
        yield json.dumps([member.name, member.start, member.size_bytes]).encode()
        yield member.text or b""
    yield from (text.encode() for text in problem)


def _blocks(uri: str, start: int, size_bytes: int) -> Iterator[bytes]:
    for offset in range(start, start + size_bytes, _BLOCK_BYTES):
        yield storage.read_range(uri, offset, min(_BLOCK_BYTES, start + size_bytes - offset))


_PARTS: dict[str, Callable[[str], Iterator[bytes]]] = {".parquet": _parquet, ".tar": _tar}
