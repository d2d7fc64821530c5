"""Reading a cache: one image's features by its key, with one range read and one checksum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meteor import storage
from meteor.cache.codec import get_codec
from meteor.cache.folder import PINS, CacheInfo, read_cache_info
from meteor.cache.identity import CacheIdentity
from meteor.cache.manifest import Manifest, latest_manifest, read_keys, read_manifest, read_quarantine
from meteor.cache.quarantine import QuarantineRow, quarantine_rows
from meteor.cache.row import ImageFeatures, decode_payload, payload_crc32
from meteor.cache.table import RowReader
from meteor.cache.verify import verify_files
from meteor.errors import AlreadyExistsError, CacheError, CorruptPayloadError, NotFoundError


class FeatureCache:
    """One committed version of a cache; what is committed later does not change it. Safe to share between threads.

    Holds the key index alone (about 200 bytes an image). A pickled cache is its URI and version, read again where it is
    loaded.
    """

    def __init__(self, uri: str, info: CacheInfo, manifest: Manifest) -> None:
        self.uri = uri
        self.manifest = manifest
        self._info = info
        self._codec = get_codec(info.codec)
        self._index = RowReader(read_keys(uri, manifest), repeated="file")

    @classmethod
    def open(cls, uri: str, *, version: int | None = None) -> "FeatureCache":
        """The cache at ``<root>/<key>/<codec>``.

        Args:
            uri: as `create_cache` returned it.
            version: a committed version; the latest when None.

        Raises:
            CacheError: there is no cache, or no such version, or nothing has been committed.
        """
        uri = storage.absolute(uri)
        info = read_cache_info(uri)
        version = latest_manifest(uri) if version is None else version
        if version == 0:
            raise CacheError(f"{uri} has no committed version yet; run cache_features")
        return cls(uri, info, read_manifest(uri, version))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self.version)

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
        row = self._row(image_key)
        start, end = row["features_offset"], row["cls_offset"] + row["cls_size"]
        uri = storage.join(self.uri, row["file"])
        # Torch's memory is aligned, and not zeroed first as a bytearray would be.
        buffer = torch.empty(end - start, dtype=torch.uint8).numpy().data
        storage.read_range_into(uri, start, buffer)
        features = buffer[: row["features_size"]]
        # Copies: behind features of any size these two are not aligned for float32, and they are small.
        cls_attention, cls = (
            bytearray(buffer[row[f"{name}_offset"] - start :][: row[f"{name}_size"]])
            for name in ("cls_attention", "cls")
        )
        if payload_crc32(features, cls_attention, cls) != row["crc32"]:
            raise CorruptPayloadError(
                f"image {image_key}: its bytes in {uri} (from {start} to {end}) do not match their checksum. "
                "Run `meteor cache verify` for the extent of the damage, restore the file, or encode again"
            )
        image = decode_payload(row, features, cls_attention, cls, self._codec)
        return image if attention_layers is None else image.with_attention(attention_layers)

    def quarantine(self) -> list[QuarantineRow]:
        """The pictures that could not be encoded."""
        return quarantine_rows(read_quarantine(self.uri, self.manifest))

    def quarantined(self) -> dict[str, str]:
        """Reason by image key, or by name where a picture's bytes could not be read."""
        return {row.key: row.reason for row in self.quarantine()}

    def verify(self) -> list[str]:
        """Read everything, page checksums included, and compare it with the key index.

        Returns:
            One line for each problem; empty when all is well.
        """
        return verify_files(self.uri, read_keys(self.uri, self.manifest), self._codec)

    def pin(self, run_digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Note that a run reads this version, at its first start; afterwards the first pin stays.

        Returns:
            The pin in force: ``payload`` and ``manifest_version`` as first pinned.
        """
        pinned = {**payload, "manifest_version": self.version}
        try:
            storage.create_bytes(_pin_uri(self.uri, run_digest), storage.json_bytes(pinned))
        except AlreadyExistsError:
            return storage.read_json(_pin_uri(self.uri, run_digest))
        return pinned

    def _row(self, image_key: str) -> dict[str, Any]:
        position = self._index.find_sorted("image_key", image_key)
        if position is None:
            reason = self.quarantined().get(image_key)
            raise CacheError(
                f"image {image_key} is not in version {self.version} of {self.uri}: "
                + (f"it is quarantined ({reason})" if reason else "run cache_features over the data set")
            )
        return self._index.row(position)


def read_pin(cache_uri: str, run_digest: str) -> dict[str, Any] | None:
    """What `FeatureCache.pin` noted for the run; None if it has not started yet."""
    try:
        return storage.read_json(_pin_uri(cache_uri, run_digest))
    except NotFoundError:
        return None


def _pin_uri(cache_uri: str, run_digest: str) -> str:
    return storage.join(cache_uri, PINS, f"{run_digest}.json")


def _reopen(uri: str, version: int) -> FeatureCache:
    return FeatureCache.open(uri, version=version)
