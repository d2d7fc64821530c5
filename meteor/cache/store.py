"""Reading of a cache: an image's features by its key, with a single range read and a single checksum."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from meteor import storage
from meteor.cache.buffers import PAYLOAD_MEMORY
from meteor.cache.calibration import codec_of
from meteor.cache.disk_tier import DiskTier
from meteor.cache.folder import DATA, CacheInfo, read_cache_info
from meteor.cache.identity import CacheIdentity
from meteor.cache.manifest import Manifest, latest_manifest, read_keys, read_manifest, read_quarantine
from meteor.cache.pins import pin_version
from meteor.cache.prefetch import read_ahead
from meteor.cache.quality import summarise_errors
from meteor.cache.quarantine import QuarantineRow, quarantine_rows
from meteor.cache.row import PAYLOAD_COLUMNS, decode_payload, payload_crc32
from meteor.cache.table import RowReader
from meteor.cache.verify import verify_files
from meteor.errors import CacheError, CorruptPayloadError
from meteor.features import ImageFeatures

# Columns of the key index that a read needs; the others are not kept in memory.
_READ_COLUMNS = (
    *("image_key", "width", "height", "grid_columns", "grid_rows", "patch_grids", "attention_layers", "crc32", "file"),
    *("features_offset", "features_size", "cls_attention_offset", "cls_attention_size", "cls_offset", "cls_size"),
)


class FeatureCache:
    """A committed version of a cache, which later commits do not change; safe to share between threads.

    It holds only the key index in memory, about 200 bytes per image. A pickled cache contains only its URI and version, and
    the process that loads it reads the index again.
    """

    def __init__(self, uri: str, info: CacheInfo, manifest: Manifest, disk_tier: DiskTier | None = None) -> None:
        self.uri = uri
        self.manifest = manifest
        self._info = info
        self._codec = codec_of(uri, info)
        self._disk_tier = disk_tier
        self._index = RowReader(read_keys(uri, manifest).select(_READ_COLUMNS), repeated="file")
        start, last, last_size = (
            self._index.column(name).to_numpy() for name in ("features_offset", "cls_offset", "cls_size")
        )
        # Each range covers the three payloads and the two page headers between them.
        self._sizes_bytes = last + last_size - start

    @classmethod
    def open(cls, uri: str, *, version: int | None = None, disk_tier: DiskTier | None = None) -> "FeatureCache":
        """Open the cache at ``<root>/<key>/<codec>``.

        Args:
            uri: URI from `create_cache`.
            version: a committed version; None for the latest.
            disk_tier: disk tier that keeps payloads on this node's disk; useful for a cache on S3.

        Raises:
            CacheError: the cache or the version does not exist, or nothing has been committed.
        """
        uri = storage.absolute(uri)
        info = read_cache_info(uri)
        version = latest_manifest(uri) if version is None else version
        if version == 0:
            raise CacheError(f"{uri} has no committed version yet; run cache_features")
        return cls(uri, info, read_manifest(uri, version), disk_tier)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self.version, self._disk_tier)

    @property
    def identity(self) -> CacheIdentity:
        """Identity of the features; a model compares it with the identity that it needs (`CacheIdentity.require_match`)."""
        return self._info.identity

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self._info.codec

    @property
    def version(self) -> int:
        """Number of the version."""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """Fingerprint of this version's content, wherever it is: 36 hexadecimal digits, as MLflow's datasets allow."""
        content = (self.manifest.keys, self._codec.name, self._codec.calibration_digest)
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:36]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images' payloads, without shadowed rows."""
        return self.manifest.payload_bytes

    @property
    def num_sub_images(self) -> int:
        """Number of sub-images of all images."""
        return len(self._index.column("patch_grids").flatten()) // 2

    def keys(self) -> list[str]:
        """Return the image keys, sorted."""
        return self._index.column("image_key").to_pylist()

    def missing(self, image_keys: pa.StringArray) -> pa.StringArray:
        """Return the keys that are not in this version, each once."""
        is_held = pc.is_in(image_keys, value_set=self._index.column("image_key"))
        return pc.unique(image_keys.filter(pc.invert(is_held)))

    def __len__(self) -> int:
        return self.manifest.num_images

    def __contains__(self, image_key: str) -> bool:
        return self._index.find_sorted("image_key", image_key) is not None

    def keys_with_attention(self, layers: Sequence[int]) -> list[str]:
        """Return the sorted keys of images whose cached attention covers ``layers``, which need not be encoded again."""
        held = self._index.column("attention_layers").to_pylist()
        return [key for key, cached in zip(self.keys(), held, strict=True) if set(layers) <= set(cached)]

    def get(self, image_key: str, *, attention_layers: Sequence[int] | None = None) -> ImageFeatures:
        """Read and check an image's features in a single range; the feature tensors share the memory that was read.

        Args:
            image_key: sha256 of the image file's bytes.
            attention_layers: layers whose attention is returned, in this order; None for all cached layers.

        Raises:
            CacheError: the image or a layer is not in this version.
            CorruptPayloadError: the bytes have changed since they were written.
        """
        position = self._position(image_key)
        row = self._index.row(position)
        size_bytes = int(self._sizes_bytes[position])
        storage.check_range(storage.join_below(self.uri, row["file"]), row["features_offset"], size_bytes)
        buffer = PAYLOAD_MEMORY.take(size_bytes)
        if not self._read_from_tier(row, buffer):
            self._read_from_origin(row, buffer)
        features, cls_attention, cls = _payloads(row, buffer)
        # Attention and class tokens are copied, because behind features of any size they are not aligned for float32. Both
        # are small.
        image = decode_payload(row, features, bytearray(cls_attention), bytearray(cls), self._codec)
        return image if attention_layers is None else image.with_attention(attention_layers)

    def prefetch(
        self,
        keys: Iterable[str],
        *,
        num_threads: int = 8,
        max_bytes: int = 512 << 20,
        attention_layers: Sequence[int] | None = None,
    ) -> Generator[ImageFeatures, None, None]:
        """Yield the features of images in the order of ``keys``, while threads read the following images.

        If a key comes twice among the images that are read ahead, it is read once and yields the same tensors twice. The
        threads end when the iterator is closed or deleted.

        Args:
            keys: image keys, which may repeat and be endless; only as many are taken as are read ahead.
            num_threads: images that are read at the same time.
            max_bytes: most bytes of the images that are read ahead; a larger image is read alone.
            attention_layers: layers whose attention is returned, see `get`.

        Raises:
            CacheError: an image or a layer is not in this version; raised when the image's turn comes.
            CorruptPayloadError: the bytes have changed since they were written; raised when the image's turn comes.
        """
        return read_ahead(
            keys,
            lambda key: self.get(key, attention_layers=attention_layers),
            self._size_of,
            num_threads=num_threads,
            max_bytes=max_bytes,
        )

    def quarantine(self) -> list[QuarantineRow]:
        """Read the rows of the images that could not be encoded."""
        return quarantine_rows(read_quarantine(self.uri, self.manifest))

    def quarantined(self) -> dict[str, str]:
        """Map the image keys of quarantined images, or their names if the bytes could not be read, to reasons."""
        return {row.key: row.reason for row in self.quarantine()}

    def codec_error(self) -> dict[str, Any]:
        """Summarise the errors of storage over all images (`summarise_errors`)."""
        return summarise_errors(read_keys(self.uri, self.manifest))

    def verify(self, *, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read all data files, check page checksums, and compare the rows with the key index.

        Args:
            on_progress: called with the number of files read and of all files.

        Returns:
            A line for each problem; empty if there are none.
        """
        return verify_files(self.uri, read_keys(self.uri, self.manifest), self._codec, on_progress=on_progress)

    def pin(self, run_digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Pin this version for a run at its first start; later calls leave the first pin unchanged.

        Returns:
            The run's first pin, with ``payload`` and ``manifest_version``.

        Raises:
            CacheError: this version was deleted in the meantime.
        """
        return pin_version(self.uri, self.version, run_digest, payload)

    def _read_from_tier(self, row: Mapping[str, Any], buffer: memoryview) -> bool:
        """Fill the buffer from the disk tier; return False if the payload is absent or damaged there."""
        if self._disk_tier is None:
            return False
        name = _file_id(row), row["features_offset"]
        if not self._disk_tier.read_into(*name, buffer):
            return False
        if _is_intact(row, buffer):
            return True
        # A disk can damage files too; the origin then gives the payload again.
        self._disk_tier.drop(*name)
        return False

    def _read_from_origin(self, row: Mapping[str, Any], buffer: memoryview) -> None:
        start, uri = row["features_offset"], storage.join_below(self.uri, row["file"])
        storage.read_range_into(uri, start, buffer)
        if not _is_intact(row, buffer):
            raise CorruptPayloadError(
                f"image {row['image_key']}: its bytes in {uri} (from {start} to {start + len(buffer)}) do not match their "
                "checksum. Run `meteor cache verify` for the extent of the damage, restore the file, or encode again"
            )
        if self._disk_tier is not None:
            self._disk_tier.write(_file_id(row), start, buffer)

    def _size_of(self, image_key: str) -> int:
        """Return the bytes that `get` reads; 0 for an absent image, for which `get` raises the error."""
        position = self._index.find_sorted("image_key", image_key)
        return 0 if position is None else int(self._sizes_bytes[position])

    def _position(self, image_key: str) -> int:
        position = self._index.find_sorted("image_key", image_key)
        if position is None:
            reason = self.quarantined().get(image_key)
            raise CacheError(
                f"image {image_key} is not in version {self.version} of {self.uri}: "
                + (f"it is quarantined ({reason})" if reason else "run cache_features over the data set")
            )
        return position


def _payloads(row: Mapping[str, Any], buffer: memoryview) -> list[memoryview]:
    """Divide the range into features, class-token attention and class tokens."""
    starts = [row[f"{name}_offset"] - row["features_offset"] for name in PAYLOAD_COLUMNS]
    return [buffer[start:][: row[f"{name}_size"]] for name, start in zip(PAYLOAD_COLUMNS, starts, strict=True)]


def _is_intact(row: Mapping[str, Any], buffer: memoryview) -> bool:
    return payload_crc32(*_payloads(row, buffer)) == row["crc32"]


def _file_id(row: Mapping[str, Any]) -> str:
    """Return the unique part of the data file's name."""
    return row["file"].removeprefix(f"{DATA}/").removesuffix(".parquet")


def _reopen(uri: str, version: int, disk_tier: DiskTier | None) -> FeatureCache:
    return FeatureCache.open(uri, version=version, disk_tier=disk_tier)
