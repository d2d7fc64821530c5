"""Reading a cache: one image's features by its key, with one range read and one checksum."""

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

# What a read needs to know; of the other columns of the key index nothing is kept in memory.
_READ_COLUMNS = (
    *("image_key", "width", "height", "grid_columns", "grid_rows", "patch_grids", "attention_layers", "crc32", "file"),
    *("features_offset", "features_size", "cls_attention_offset", "cls_attention_size", "cls_offset", "cls_size"),
)


class FeatureCache:
    """One committed version of a cache; what is committed later does not change it. Safe to share between threads.

    Holds the key index alone (about 200 bytes an image). A pickled cache is its URI and version, read again where it is
    loaded.
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
        # From the first byte of the three payloads to the last; two page headers lie in between.
        self._sizes_bytes = last + last_size - start

    @classmethod
    def open(cls, uri: str, *, version: int | None = None, disk_tier: DiskTier | None = None) -> "FeatureCache":
        """The cache at ``<root>/<key>/<codec>``.

        Args:
            uri: as `create_cache` returned it.
            version: a committed version; the latest when None.
            disk_tier: keeps what is read on this node's disk; of use where the cache is on S3.

        Raises:
            CacheError: there is no cache, or no such version, or nothing has been committed.
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
        """What the features were made with; a model compares it with what it needs (`CacheIdentity.require_match`)."""
        return self._info.identity

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self._info.codec

    @property
    def version(self) -> int:
        """The manifest's version."""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """Fingerprint of what this version serves, its place apart from it: 36 hexadecimal digits for MLflow's datasets."""
        content = (self.manifest.keys, self._codec.name, self._codec.calibration_digest)
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:36]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images' payloads, shadowed rows not counted."""
        return self.manifest.payload_bytes

    @property
    def num_sub_images(self) -> int:
        """Sub-images of all images."""
        return len(self._index.column("patch_grids").flatten()) // 2

    def keys(self) -> list[str]:
        """The image keys, sorted."""
        return self._index.column("image_key").to_pylist()

    def missing(self, image_keys: pa.StringArray) -> pa.StringArray:
        """The keys that are not in this version, each once."""
        asked = pc.unique(image_keys)
        return asked.filter(pc.invert(pc.is_in(asked, value_set=self._index.column("image_key"))))

    def __len__(self) -> int:
        return self.manifest.num_images

    def __contains__(self, image_key: str) -> bool:
        return self._index.find_sorted("image_key", image_key) is not None

    def keys_with_attention(self, layers: Sequence[int]) -> list[str]:
        """The keys whose cached attention covers ``layers``, sorted: those that need not be encoded for them."""
        held = self._index.column("attention_layers").to_pylist()
        return [key for key, cached in zip(self.keys(), held, strict=True) if set(layers) <= set(cached)]

    def get(self, image_key: str, *, attention_layers: Sequence[int] | None = None) -> ImageFeatures:
        """One image's features, read in one range and checked; the feature tensors share the memory that was read.

        Args:
            image_key: sha256 of the image file's bytes.
            attention_layers: the layers wanted, in this order; all that are cached when None.

        Raises:
            CacheError: the image or a layer is not in this version.
            CorruptPayloadError: the bytes changed since they were written.
        """
        position = self._position(image_key)
        row = self._index.row(position)
        buffer = PAYLOAD_MEMORY.take(int(self._sizes_bytes[position]))
        if not self._read_from_tier(row, buffer):
            self._read_from_origin(row, buffer)
        features, cls_attention, cls = _payloads(row, buffer)
        # Copies: behind features of any size these two are not aligned for float32, and they are small.
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
        """The features of the images in the order of ``keys``, with the coming ones read by threads in the meantime.

        A key that stands twice among those being read ahead is read once: both places give the same tensors. Closing the
        iterator, or letting go of it, ends the threads.

        Args:
            keys: image keys; may repeat, may be endless, are pulled no further than is read ahead.
            num_threads: images read at the same time.
            max_bytes: what the images that are read ahead take together; a larger one is read alone.
            attention_layers: as in `get`.

        Raises:
            CacheError, CorruptPayloadError: as `get`, when it is this image's turn.
        """
        return read_ahead(
            keys,
            lambda key: self.get(key, attention_layers=attention_layers),
            self._size_of,
            num_threads=num_threads,
            max_bytes=max_bytes,
        )

    def quarantine(self) -> list[QuarantineRow]:
        """The images that could not be encoded."""
        return quarantine_rows(read_quarantine(self.uri, self.manifest))

    def quarantined(self) -> dict[str, str]:
        """Reason by image key, or by name where an image's bytes could not be read."""
        return {row.key: row.reason for row in self.quarantine()}

    def codec_error(self) -> dict[str, Any]:
        """What storing has changed, over all images (`summarise_errors`)."""
        return summarise_errors(read_keys(self.uri, self.manifest))

    def verify(self, *, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read everything, page checksums included, and compare it with the key index.

        Args:
            on_progress: gets the number of files read and of all files.

        Returns:
            One line for each problem; empty when all is well.
        """
        return verify_files(self.uri, read_keys(self.uri, self.manifest), self._codec, on_progress=on_progress)

    def pin(self, run_digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Note that a run reads this version, at its first start; afterwards the first pin stays.

        Returns:
            The pin in force: ``payload`` and ``manifest_version`` as first pinned.

        Raises:
            CacheError: this version was deleted in the meantime.
        """
        return pin_version(self.uri, self.version, run_digest, payload)

    def _read_from_tier(self, row: Mapping[str, Any], buffer: memoryview) -> bool:
        """Whether the disk tier had the payload, whole and unchanged."""
        if self._disk_tier is None:
            return False
        name = _file_id(row), row["features_offset"]
        if not self._disk_tier.read_into(*name, buffer):
            return False
        if _is_intact(row, buffer):
            return True
        self._disk_tier.drop(*name)
        return False

    def _read_from_origin(self, row: Mapping[str, Any], buffer: memoryview) -> None:
        start, uri = row["features_offset"], storage.join(self.uri, row["file"])
        storage.read_range_into(uri, start, buffer)
        if not _is_intact(row, buffer):
            raise CorruptPayloadError(
                f"image {row['image_key']}: its bytes in {uri} (from {start} to {start + len(buffer)}) do not match their "
                "checksum. Run `meteor cache verify` for the extent of the damage, restore the file, or encode again"
            )
        if self._disk_tier is not None:
            self._disk_tier.write(_file_id(row), start, buffer)

    def _size_of(self, image_key: str) -> int:
        """Bytes that `get` reads; 0 for an image that is not there, which `get` complains about."""
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
    """Features, class-token attention and class tokens inside the range that holds all three."""
    starts = [row[f"{name}_offset"] - row["features_offset"] for name in PAYLOAD_COLUMNS]
    return [buffer[start:][: row[f"{name}_size"]] for name, start in zip(PAYLOAD_COLUMNS, starts, strict=True)]


def _is_intact(row: Mapping[str, Any], buffer: memoryview) -> bool:
    return payload_crc32(*_payloads(row, buffer)) == row["crc32"]


def _file_id(row: Mapping[str, Any]) -> str:
    """The unique part of the data file's name."""
    return row["file"].removeprefix(f"{DATA}/").removesuffix(".parquet")


def _reopen(uri: str, version: int, disk_tier: DiskTier | None) -> FeatureCache:
    return FeatureCache.open(uri, version=version, disk_tier=disk_tier)
