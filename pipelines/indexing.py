"""First pass of cache_features: every picture file is read, hashed and decoded once, and the dataset index published."""

import hashlib
import logging
from typing import Any

import ray

from meteor import storage
from meteor.cache import (
    DatasetIndex,
    IndexRow,
)
from meteor.config import RunSettings
from meteor.data.roots import resolve_image
from meteor.errors import BadImageError, ImagePathError, NotFoundError
from meteor.image.decode import decode_image
from pipelines.inputs import (
    SampleSet,
    index_uri,
)
from pipelines.runtime import num_blocks, progress

_LOG = logging.getLogger(__name__)


def update_index(settings: RunSettings, sets: list[SampleSet]) -> tuple[DatasetIndex, int]:
    """Publish the index of all pictures; only new and changed files are read.

    Returns:
        The index, and how many files were read.
    """
    places = _places(settings, sets)
    latest = DatasetIndex.latest(index_uri(settings))
    rows: list[IndexRow] = []
    to_read: list[dict[str, str]] = []
    for name, uri in places.items():
        if uri.startswith("outside:"):
            rows.append(IndexRow(name, uri, 0, "", "", 0, 0, "bad", "outside_roots"))
            continue
        try:
            info = storage.stat(uri)
        except NotFoundError:
            rows.append(IndexRow(name, uri, 0, "", "", 0, 0, "bad", "missing"))
            continue
        unchanged = latest.unchanged(info) if latest else None
        if unchanged is None:
            to_read.append({"name": name, "uri": uri})
        else:
            rows.append(unchanged)
    _LOG.info("%d pictures, %d of them new or changed since the last index", len(places), len(to_read))
    rows += read_pictures(to_read, settings.data.max_pixels)
    return DatasetIndex.publish(index_uri(settings), rows), len(to_read)


def read_pictures(places: list[dict[str, str]], max_pixels: int) -> list[IndexRow]:
    """Read, hash and decode pictures on all CPUs of the cluster."""
    if not places:
        return []
    dataset = ray.data.from_items(places, override_num_blocks=num_blocks(len(places), 16)).map(
        _read_picture, fn_kwargs={"max_pixels": max_pixels}
    )
    rows: list[IndexRow] = []
    with progress("pictures indexed", len(places), lambda: len(rows)):
        for row in dataset.iter_rows():
            rows.append(IndexRow(**row))
    return rows


def _read_picture(row: dict[str, str], *, max_pixels: int) -> dict[str, Any]:
    info = storage.stat(row["uri"])
    data = storage.read_bytes(row["uri"])
    fields = {"name": row["name"], "uri": row["uri"], "size_bytes": info.size_bytes, "etag": info.etag}
    fields["image_key"] = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except BadImageError as error:
        return {**fields, "width": 0, "height": 0, "status": "bad", "reason": error.reason}
    return {**fields, "width": image.width, "height": image.height, "status": "ok", "reason": ""}


def _places(settings: RunSettings, sets: list[SampleSet]) -> dict[str, str]:
    """Image name -> URI; a name that leaves its root keeps a marked place, and is never opened."""
    places: dict[str, str] = {}
    for name in sorted(set().union(*(one.image_names for one in sets))):
        try:
            places[name] = resolve_image(name, settings.data.roots)
        except ImagePathError:
            places[name] = f"outside:{name}"
    return places
