"""The same features in another codec, from one variant of a cache to another, without the encoder."""

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

FILE_BYTES = 128 << 20
FILES_PER_COMMIT = 16
_READ_AHEAD_BYTES = 256 << 20


def transcode(
    source_uri: str, codec: str, *, on_progress: Callable[[int, int], None] | None = None, num_threads: int = 8
) -> str:
    """Make the variant of a cache in another codec beside it, or complete it: what it holds already is left alone.

    The measured errors of its rows are against the source's features. Images go one by one; in memory are a data file
    and what is read ahead of it. The quarantine comes along.

    Args:
        source_uri: ``<root>/<key>/<codec>``; its latest version is taken.
        codec: the variant's codec; int8 is calibrated on the source if it has not been yet.
        on_progress: called with the number of images done and of all images.
        num_threads: images read at the same time.

    Returns:
        The variant's URI, all committed.

    Raises:
        CacheError: the source is int8, has this codec already, has nothing committed, or does not lie in a folder named
            after its key.
        SettingsError: there is no such codec.
    """
    source = FeatureCache.open(source_uri)
    target_uri = _create_target(source, codec)
    if needs_calibration(target_uri):
        calibrate(target_uri, source.prefetch(source.keys()[:CALIBRATION_IMAGES], num_threads=num_threads))
    # Adopts what an interrupted run had finished.
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
    """The rows of a variant as they come: files of about `FILE_BYTES`, a commit now and then."""

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
        """Write what is left and the quarantine of both, and commit all."""
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
            f"{source.uri} is {INT8_CODEC}: no other codec can bring back what it left out. Transcode from the variant it "
            "was made from, or run cache_features with the codec you want"
        )
    if source.codec == codec:
        raise CacheError(f"{source.uri} is {codec} already; name another codec")
    root_uri, key, folder = source.uri.rsplit("/", 2)
    if (key, folder) != (source.identity.key, source.codec):
        raise CacheError(
            f"{source.uri} does not end in its key and codec, {source.identity.key}/{source.codec}, so that its variant would "
            "not be found beside it: copy the cache to such a place"
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
