"""First pass of cache_features: read, hash and decode every image file once, and publish the dataset index."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from meteor import storage
from meteor.assembly import index_uri
from meteor.assembly.sample_sets import names_of_images
from meteor.cache import DatasetIndex, IndexRow, retryable
from meteor.config import RunSettings
from meteor.data.roots import resolve_image
from meteor.data.sample_sets import SampleSet
from meteor.errors import ImagePathError, InaccessibleError, NotFoundError
from meteor.image.files import at_image
from meteor.image.inside import file_of, find_place
from pipelines.ray_parts.image_facts import read_image
from pipelines.ray_parts.runtime import num_blocks, progress

_LOG = logging.getLogger(__name__)
_OUTSIDE = "outside:"
# If a folder of an object store has fewer names than this, each is looked up: the folder may hold millions of other files.
_LIST_FROM = 32
_NUM_STAT_THREADS = 32
# The hub's image data sets have a hundred to a thousand rows per row group.
_INSIDE_PER_BLOCK = 512


def update_index(settings: RunSettings, sets: list[SampleSet], roots: Mapping[str, str]) -> tuple[DatasetIndex, int]:
    """Publish the index of all images; read only new and changed files, and publish finished rows regularly.

    Args:
        settings: settings of the run.
        sets: sample sets whose images are indexed.
        roots: prefix of an image name -> folder or s3:// URI.

    Returns:
        The index, and the number of files that were new, had changed, or gave another result than before.
    """
    places = _places(sets, roots)
    latest = DatasetIndex.latest(index_uri(settings))
    found = stat_all(set(places.values()))
    rows: list[IndexRow] = []
    # A file with several names is read once.
    to_read: dict[str, list[str]] = defaultdict(list)
    retried: dict[str, IndexRow] = {}
    for name, uri in places.items():
        info = found.get(uri)
        if info is None:
            rows.append(IndexRow(name, uri, 0, "", "", 0, 0, "bad", _reason(uri)))
            continue
        unchanged = latest.unchanged(info) if latest else None
        if unchanged and not retryable(unchanged.reason):
            rows.append(replace(unchanged, name=name))
            continue
        to_read[uri].append(name)
        if unchanged:
            retried.setdefault(uri, replace(unchanged, name=name))
    _LOG.info("%d images, %d of them new or changed since the last index", len(places), len(to_read))
    published_at, num_read = time.monotonic(), 0
    for row in read_images(
        [{"name": names[0], "uri": uri} for uri, names in to_read.items()], settings.data.max_pixels
    ):
        rows += [replace(row, name=name) for name in to_read[row.uri]]
        num_read += row != retried.get(row.uri)
        if time.monotonic() - published_at >= settings.cache.commit_every_s:
            DatasetIndex.publish(index_uri(settings), rows)
            published_at = time.monotonic()
    return DatasetIndex.publish(index_uri(settings), rows), num_read


def stat_all(uris: Iterable[str]) -> dict[str, storage.ObjectInfo]:
    """Return size and etag of the files that exist; in object stores, a listing returns a thousand of them per request.

    An image inside a data file has the size and etag of that file.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        if _is_place(uri):
            images[file_of(uri)].append(uri)
    found = _stat_files(images)
    return {uri: at_image(info, uri) for file, info in found.items() for uri in images[file]}


def _stat_files(uris: Iterable[str]) -> dict[str, storage.ObjectInfo]:
    by_folder: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        by_folder[storage.parent(uri)].append(uri)
    listed: set[str] = set()
    for folder in sorted(by_folder):
        # A listing includes the folders below, which come later in this order.
        if folder.startswith("s3://") and len(by_folder[folder]) >= _LIST_FROM and not _is_below(folder, listed):
            listed.add(folder)
    wanted = {uri for folder in by_folder if _is_below(folder, listed) for uri in by_folder[folder]}
    single = [uri for folder in by_folder if not _is_below(folder, listed) for uri in by_folder[folder]]
    found: dict[str, storage.ObjectInfo] = {}
    num_done = 0
    with (
        ThreadPoolExecutor(_NUM_STAT_THREADS) as pool,
        progress("images looked up:", len(wanted) + len(single), lambda: num_done),
    ):
        for infos in pool.map(storage.list_objects, sorted(listed)):
            new = {info.uri: info for info in infos if info.uri in wanted}
            found |= new
            num_done += len(new)
        for uri, info in zip(single, pool.map(_stat_if_there, single), strict=True):
            num_done += 1
            if info:
                found[uri] = info
    return found


def _is_below(folder: str, listed: set[str]) -> bool:
    """Return whether a folder, or a folder above it, is in ``listed``."""
    while folder and folder not in listed:
        folder = storage.parent(folder)
    return bool(folder)


def read_images(places: list[dict[str, str]], max_pixels: int) -> Iterator[IndexRow]:
    """Read, hash and decode images on all CPUs of the cluster."""
    if not places:
        return
    # A block of images inside Parquet files spans several row groups, as each block decodes its first one from the start.
    is_inside = any(find_place(place["uri"]) for place in places)
    blocks = num_blocks(len(places), _INSIDE_PER_BLOCK if is_inside else 16)
    dataset = ray.data.from_items(places, override_num_blocks=blocks).map(
        read_image, fn_kwargs={"max_pixels": max_pixels}
    )
    num_done = 0
    with progress("images indexed:", len(places), lambda: num_done):
        for row in dataset.iter_rows():
            num_done += 1
            yield IndexRow(**row)


def _stat_if_there(uri: str) -> storage.ObjectInfo | None:
    try:
        return storage.stat(uri)
    except NotFoundError:
        return None
    except InaccessibleError:
        # Reading it will tell the reason.
        return storage.ObjectInfo(uri, 0, "", 0.0)


def _is_place(uri: str) -> bool:
    return not uri.startswith(_OUTSIDE)


def _reason(uri: str) -> str:
    return "missing" if _is_place(uri) else "outside_roots"


def _places(sets: list[SampleSet], roots: Mapping[str, str]) -> dict[str, str]:
    """Return image name -> URI; a name that leads out of its root gets a mark instead of a URI, and is never opened."""
    places: dict[str, str] = {}
    for name in sorted(names_of_images(sets)):
        try:
            places[name] = resolve_image(name, roots)
        except ImagePathError:
            places[name] = f"{_OUTSIDE}{name}"
    return places
