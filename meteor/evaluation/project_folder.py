"""A folder of projected images: what it may hold, which are done, and what is in a file."""

import json
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import safetensors.torch
import torch

from meteor import storage
from meteor.cache import FeatureCache
from meteor.errors import AlreadyExistsError, CacheError, SettingsError
from meteor.evaluation.projected import ProjectedImage
from meteor.model.trained_projector import TrainedProjector

RECORD = "project.json"
_SUFFIX = ".safetensors"
_NUM_DELETERS = 16
_NUM_SHOWN = 5
# Folders whose records differ in one of these hold different tokens.
_DECIDING = ("format", "projector_digest", "cache_key", "codec", "dtype")
_FORMAT = 1


def describe_source(cache: FeatureCache, projector: TrainedProjector) -> dict[str, Any]:
    """What a folder's ``project.json`` says: which projector, which cache, which type."""
    return {
        "format": _FORMAT,
        "projector_digest": projector.digest,
        "cache_key": cache.identity.key,
        "codec": cache.codec,
        "dtype": str(projector.dtype).removeprefix("torch."),
        "projector": projector.module.settings,
        "select_layer": projector.select_layer,
        "checkpoint": projector.uri,
        "cache": cache.uri,
    }


def file_uris(folder_uri: str, keys: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Image key -> its file, named by ``names`` or by the key.

    Raises:
        CacheError: a name leaves the folder, or two images would have one name.
    """
    folder_uri = storage.absolute(folder_uri)
    relative = {key: posixpath.normpath(names.get(key, key).replace("://", "/").lstrip("/")) for key in keys}
    if outside := [name for name in relative.values() if name.split("/")[0] == ".."]:
        raise CacheError(f"the names {outside[:_NUM_SHOWN]} lead out of the folder; ask for these images by image key")
    if len(set(relative.values())) < len(relative):
        taken = list(relative.values())
        repeated = sorted({name for name in taken if taken.count(name) > 1})
        raise CacheError(f"several images would be written to {', '.join(repeated[:_NUM_SHOWN])}; ask by image key")
    return {key: storage.join(folder_uri, f"{name}{_SUFFIX}") for key, name in relative.items()}


def claim_folder(folder_uri: str, record: Mapping[str, Any], files: Iterable[str], *, overwrite: bool) -> set[str]:
    """Make sure that the folder holds, and will hold, nothing but images of this record.

    Args:
        folder_uri: local or s3://; need not exist.
        record: `describe_source`.
        files: URIs that are going to be written.
        overwrite: delete the images of an earlier run first. Only files of a folder with a record, and ``files``, are
            deleted.

    Returns:
        URIs of all files that are there, complete.

    Raises:
        SettingsError: the folder holds images of something else, or files of these names that nobody vouches for.
    """
    folder_uri, files = storage.absolute(folder_uri), set(files)
    record_uri = storage.join(folder_uri, RECORD)
    there = {info.uri for info in storage.list_objects(folder_uri)}
    if overwrite:
        ours = {uri for uri in there if uri.endswith(_SUFFIX)} if record_uri in there else files & there
        # The record last: a crash in between leaves fewer images of the old one.
        with ThreadPoolExecutor(_NUM_DELETERS) as pool:
            list(pool.map(storage.delete, ours))
        storage.write_json(record_uri, record)
        return set()
    if record_uri not in there:
        if strangers := sorted(files & there):
            raise SettingsError(
                f"{folder_uri} has no {RECORD}, but files of the names that would be written, {strangers[0]} for example: "
                "name another folder, or start over with overwrite (--overwrite)"
            )
        # Where another process began in the meantime, its record is looked at below.
        with suppress(AlreadyExistsError):
            storage.create_bytes(record_uri, storage.json_bytes(record))
    _check_record(folder_uri, storage.read_json(record_uri), record)
    return there


def _check_record(folder_uri: str, found: Any, record: Mapping[str, Any]) -> None:
    held = found if isinstance(found, dict) else {}
    if differing := [
        f"{name} {held.get(name)!r}, not {record[name]!r}" for name in _DECIDING if held.get(name) != record[name]
    ]:
        raise SettingsError(
            f"{folder_uri} holds images of another projector, cache or type: {'; '.join(differing)}. Name another folder, "
            "or start over with overwrite (--overwrite)"
        )


def image_bytes(image: ProjectedImage, cache: FeatureCache, projector: TrainedProjector) -> bytes:
    """An image's ``.safetensors`` file, complete in itself.

    Letters: S sub-images, the global view first, then the slices row by row; P patches and K kept tokens of a sub-image;
    D LLM width.

    Its tensors: ``tokens`` (sum of K, D) in the type that the projector ran in, in map order within a sub-image;
    ``num_tokens`` (S,) int32, K of each; ``patch_grids`` (S, 2) int32, rows and columns; ``indices`` (sum of K,) int32, the
    patch (row * columns + column, within its sub-image) that each token stands for, where the projector's tokens stand for
    single patches; ``visual_scores`` and ``native_scores`` (sum of P,) float32, where the projector computes them.

    Its metadata, all strings: ``image_key``, ``width``, ``height``, ``grid`` ("columns,rows" of slices, empty when the
    image is not sliced), ``cache_key``, ``codec``, ``version``, ``projector_digest``, ``projector`` (settings, JSON),
    ``select_layer``. To divide it again::

        tensors = safetensors.torch.load_file(path)
        num_tokens = tensors["num_tokens"].tolist()
        num_patches = tensors["patch_grids"].prod(dim=1).tolist()
        tokens = tensors["tokens"].split(num_tokens)
        indices = tensors["indices"].split(num_tokens)
        visual_scores = tensors["visual_scores"].split(num_patches)
    """
    parts = image.sub_images
    tensors = {
        "tokens": torch.cat([part.tokens for part in parts]),
        "num_tokens": torch.tensor([len(part.tokens) for part in parts], dtype=torch.int32),
        "patch_grids": torch.tensor(image.patch_grids, dtype=torch.int32),
    }
    for name in ("indices", "visual_scores", "native_scores"):
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        if values:
            tensors[name] = torch.cat(values)
    if "indices" in tensors:
        tensors["indices"] = tensors["indices"].int()
    metadata = {
        "image_key": image.image_key,
        "width": str(image.width),
        "height": str(image.height),
        "grid": ",".join(map(str, image.grid or ())),
        "cache_key": cache.identity.key,
        "codec": cache.codec,
        "version": str(cache.version),
        "projector_digest": projector.digest,
        "projector": json.dumps(projector.module.settings),
        "select_layer": str(projector.select_layer),
    }
    return safetensors.torch.save(tensors, metadata)


class FileWriter:
    """Writes files by threads, a bounded number of them waiting; leaving the block waits for all.

    Args:
        num_threads: files written at the same time.

    Attributes:
        num_bytes: that were written, complete after the block.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_bytes = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="write")
        self._max_waiting = 2 * num_threads
        self._waiting: deque[Future[int]] = deque()

    def write(self, uri: str, content: Callable[[], bytes]) -> None:
        """Write what ``content()`` gives, in a thread; an earlier file's error may come out here."""
        self._waiting.append(self._pool.submit(_write, uri, content))
        while len(self._waiting) > self._max_waiting:
            self._take()

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        # After an error that one counts, not those of the files behind it.
        while self._waiting and kind is None:
            self._take()

    def _take(self) -> None:
        self.num_bytes += self._waiting.popleft().result()


def _write(uri: str, content: Callable[[], bytes]) -> int:
    data = content()
    storage.write_bytes(uri, data)
    return len(data)
