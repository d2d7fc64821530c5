"""Transcoding: a cache's features stored in another codec, without the encoder."""

from collections.abc import Callable, Sequence

import pyarrow as pa

from meteor.cache.calibration import CALIBRATION_IMAGES, calibrate, needs_calibration, open_codec
from meteor.cache.codec import INT8_CODEC
from meteor.cache.folder import create_cache
from meteor.cache.manifest import commit, latest_manifest, read_keys
from meteor.cache.packing import encode_row
from meteor.cache.quarantine import QuarantineRow, record_quarantine
from meteor.cache.store import FeatureCache
from meteor.cache.writer import write_feature_file
from meteor.errors import BadImageError, CacheError
from meteor.features import ImageFeatures

# Large files keep the listing short; a commit now and then keeps most of the work if the process dies.
FILE_BYTES = 128 << 20
FILES_PER_COMMIT = 16
_READ_AHEAD_BYTES = 256 << 20


def transcode(
    source_uri: str, codec: str, *, on_progress: Callable[[int, int], None] | None = None, num_threads: int = 8
) -> str:
    """Store a cache's features in another codec beside it, or complete an earlier transcoding.

    The measured errors of the new rows are relative to the source's features. Only a data file and the images that are read
    ahead are in memory. The source's quarantine is copied too.

    Args:
        source_uri: ``<root>/<key>/<codec>``, of which the latest version is used.
        codec: codec of the new cache; int8 is calibrated on the source unless it has a calibration.
        on_progress: called with the number of finished images and of all images.
        num_threads: images that are read at the same time.

    Returns:
        The URI of the new cache, with everything committed.

    Raises:
        CacheError: the source is int8, has this codec already, has no committed version, or is not in a folder that is
            named by its key.
        SettingsError: no codec has this name.
    """
    source = FeatureCache.open(source_uri)
    target_uri = _create_target(source, codec)
    if needs_calibration(target_uri):
        calibrate(target_uri, source.prefetch(source.keys()[:CALIBRATION_IMAGES], num_threads=num_threads))
    # Include files that an interrupted run has finished.
    commit(target_uri)
    wanted, held = _layers_by_key(source), _layers_by_key(_latest(target_uri))
    missing = [key for key, layers in wanted.items() if key not in held or not layers <= held[key]]
    images = source.prefetch(missing, num_threads=num_threads, max_bytes=_READ_AHEAD_BYTES)
    variant = _Variant(target_uri)
    for num_done, image in enumerate(images, start=len(wanted) - len(missing) + 1):
        variant.add(image)
        if on_progress:
            on_progress(num_done, len(wanted))
    variant.finish(source.quarantine())
    return target_uri


class _Variant:
    """Writer of a transcoded cache: files of about `FILE_BYTES`, and a commit after `FILES_PER_COMMIT` files."""

    def __init__(self, cache_uri: str) -> None:
        self._cache_uri = cache_uri
        self._codec = open_codec(cache_uri)
        self._rows: list[pa.RecordBatch] = []
        self._num_bytes = 0
        self._num_files = 0
        self._bad: list[QuarantineRow] = []

    def add(self, image: ImageFeatures) -> None:
        try:
            row = encode_row(image, self._codec)
        except BadImageError as error:
            self._bad.append(QuarantineRow(image.image_key, "", error.reason, str(error)))
            return
        self._rows.append(row)
        self._num_bytes += row.nbytes
        if self._num_bytes >= FILE_BYTES:
            self._write()

    def finish(self, quarantine: Sequence[QuarantineRow]) -> None:
        """Write the remaining rows and the quarantine rows of source and target, and commit."""
        if self._rows:
            self._write()
        held = _latest(self._cache_uri)
        known = held.quarantine() if held else []
        record_quarantine(self._cache_uri, [row for row in [*quarantine, *self._bad] if row not in known])
        commit(self._cache_uri)

    def _write(self) -> None:
        write_feature_file(self._cache_uri, self._rows, self._codec)
        self._rows, self._num_bytes = [], 0
        self._num_files += 1
        if self._num_files % FILES_PER_COMMIT == 0:
            commit(self._cache_uri)


def _create_target(source: FeatureCache, codec: str) -> str:
    if source.codec == INT8_CODEC:
        raise CacheError(
            f"{source.uri} is {INT8_CODEC}: no other codec can restore the precision that it lost. Transcode the cache from "
            "which it was made, or run cache_features with the codec you want"
        )
    if source.codec == codec:
        raise CacheError(f"{source.uri} is {codec} already; name another codec")
    root_uri, key, folder = source.uri.rsplit("/", 2)
    if (key, folder) != (source.identity.key, source.codec):
        raise CacheError(
            f"{source.uri} does not end in its key and codec, {source.identity.key}/{source.codec}, so the new cache would "
            "not be found beside it: copy the cache to a folder with this ending"
        )
    return create_cache(root_uri, source.identity, codec)


def _latest(cache_uri: str) -> FeatureCache | None:
    return FeatureCache.open(cache_uri) if latest_manifest(cache_uri) else None


def _layers_by_key(cache: FeatureCache | None) -> dict[str, frozenset[int]]:
    if cache is None:
        return {}
    table = read_keys(cache.uri, cache.manifest)
    columns = (table[name].to_pylist() for name in ("image_key", "attention_layers"))
    return {key: frozenset(layers) for key, layers in zip(*columns, strict=True)}
