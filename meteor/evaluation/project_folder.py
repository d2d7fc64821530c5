"""Folders of projected images: the record of their content, the format of their files, and the writer."""

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
# If the records of two folders differ in one of these fields, their tokens differ.
_DECIDING = ("format", "projector_digest", "cache_key", "codec", "dtype")
_FORMAT = 1


def describe_source(cache: FeatureCache, projector: TrainedProjector) -> dict[str, Any]:
    """Return the content of a folder's ``project.json``: the projector, the cache and the dtype of its tokens."""
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
    """Map each image key to the URI of its file, which is named by ``names`` or else by the key.

    Raises:
        CacheError: a name leads out of the folder, or two images would have one name.
    """
    folder_uri = storage.absolute(folder_uri)
    relative = {key: posixpath.normpath(names.get(key, key).replace("://", "/").lstrip("/")) for key in keys}
    if outside := [name for name in relative.values() if name.split("/")[0] == ".."]:
        raise CacheError(f"the names {outside[:_NUM_SHOWN]} lead out of the folder; name these images by image key")
    if len(set(relative.values())) < len(relative):
        taken = list(relative.values())
        repeated = sorted({name for name in taken if taken.count(name) > 1})
        raise CacheError(
            f"several images would be written to {', '.join(repeated[:_NUM_SHOWN])}; name them by image key"
        )
    return {key: storage.join(folder_uri, f"{name}{_SUFFIX}") for key, name in relative.items()}


def claim_folder(folder_uri: str, record: Mapping[str, Any], files: Iterable[str], *, overwrite: bool) -> set[str]:
    """Reserve the folder for images of this record, and refuse a folder with other images.

    Args:
        folder_uri: local or s3://; need not exist.
        record: result of `describe_source`.
        files: URIs that are going to be written.
        overwrite: first delete the images of an earlier run. In a folder without a record, only ``files`` are deleted.

    Returns:
        URIs of all files in the folder, all of them complete.

    Raises:
        SettingsError: the folder has images of another record, or files of these names without any record.
    """
    folder_uri, files = storage.absolute(folder_uri), set(files)
    record_uri = storage.join(folder_uri, RECORD)
    there = {info.uri for info in storage.list_objects(folder_uri)}
    if overwrite:
        ours = {uri for uri in there if uri.endswith(_SUFFIX)} if record_uri in there else files & there
        # The record changes last: after a crash in between, the remaining images still fit the old record.
        # Each deletion on S3 is a round trip, so threads save most of the time.
        with ThreadPoolExecutor(_NUM_DELETERS) as pool:
            list(pool.map(storage.delete, ours))
        storage.write_json(record_uri, record)
        return set()
    if record_uri not in there:
        if strangers := sorted(files & there):
            raise SettingsError(
                f"{folder_uri} has no {RECORD}, but has files with names that would be written, for example "
                f"{strangers[0]}: name another folder, or start over with overwrite (--overwrite)"
            )
        # If another process has created the record in the meantime, the check below compares it.
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
    """Encode an image's ``.safetensors`` file, which can be read without the cache or the record.

    Letters: S sub-images, the global view first, then the slices row by row; P patches and K kept tokens of a sub-image;
    D LLM width.

    The tensors are:

    - ``tokens`` (sum of K, D) in the projector's dtype, in map order within a sub-image
    - ``num_tokens`` (S,) int32, number K of each sub-image
    - ``patch_grids`` (S, 2) int32, rows and columns
    - ``indices`` (sum of K,) int32, the patch (row * columns + column within the sub-image) of each token; only if the
      projector's tokens stand for single patches
    - ``visual_scores`` and ``native_scores`` (sum of P,) float32; only if the projector computes them

    The metadata, all strings, are ``image_key``, ``width``, ``height``, ``grid`` ("columns,rows" of slices, empty for an
    image without slices), ``cache_key``, ``codec``, ``version``, ``projector_digest``, ``projector`` (settings as JSON) and
    ``select_layer``. Divide the tensors by sub-image with::

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
    """Context that writes files in threads with a bounded queue; its end waits for all files.

    Args:
        num_threads: files that are written at the same time.

    Attributes:
        num_bytes: bytes written so far; the total is known after the block.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_bytes = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="write")
        self._max_waiting = 2 * num_threads
        self._waiting: deque[Future[int]] = deque()

    def write(self, uri: str, content: Callable[[], bytes]) -> None:
        """Write the result of ``content()`` in a thread; the error of an earlier file may be raised here."""
        self._waiting.append(self._pool.submit(_write, uri, content))
        while len(self._waiting) > self._max_waiting:
            self._take()

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        # If the block has raised an error, this error counts, not those of files that were still waiting.
        while self._waiting and kind is None:
            self._take()

    def _take(self) -> None:
        self.num_bytes += self._waiting.popleft().result()


def _write(uri: str, content: Callable[[], bytes]) -> int:
    data = content()
    storage.write_bytes(uri, data)
    return len(data)
