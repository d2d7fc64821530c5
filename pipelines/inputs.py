"""What several stages read first: sample files, pictures' places, the encoder and the cache identity it makes."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from meteor import storage
from meteor.cache import CacheIdentity, DatasetIndex, FeatureCache, IndexRow
from meteor.config import RunSettings
from meteor.data.features import LiveFeatures, PixelSettings
from meteor.data.samples import Sample, SampleProblem, load_samples
from meteor.data.table import IndexedImage
from meteor.errors import SettingsError
from meteor.train.build import DTYPES
from meteor.vision.encoder import FrozenClip


@dataclass(frozen=True)
class SampleSet:
    """One annotation file: its samples, the records that cannot be used, and a fingerprint of the file."""

    name: str
    uri: str
    samples: list[Sample]
    problems: list[SampleProblem]
    digest: str

    @cached_property
    def image_names(self) -> set[str]:
        return {name for sample in self.samples for name in sample.images}


def sample_uris(settings: RunSettings) -> dict[str, str]:
    """Name -> annotation file of every sample set that the run names."""
    data = settings.data
    named = {"pretrain": data.pretrain, "finetune": data.finetune, **data.evaluate}
    return {name: uri for name, uri in named.items() if uri}


def load_set(name: str, uri: str) -> SampleSet:
    samples, problems = load_samples(uri)
    return SampleSet(name, uri, samples, problems, hashlib.sha256(storage.read_bytes(uri)).hexdigest())


def load_sets(settings: RunSettings) -> list[SampleSet]:
    """All sample sets of the run.

    Raises:
        SettingsError: the run names none.
    """
    uris = sample_uris(settings)
    if not uris:
        raise SettingsError("the run names no samples: set data.pretrain, data.finetune or data.evaluate")
    return [load_set(name, uri) for name, uri in uris.items()]


def pixel_settings(settings: RunSettings) -> PixelSettings:
    slicing, data = settings.slicing, settings.data
    return PixelSettings(
        max_slices=slicing.max_slices,
        resolution=slicing.resolution,
        patch_size=slicing.patch_size,
        max_aspect_ratio=data.max_aspect_ratio,
        max_pixels=data.max_pixels,
    )


def load_encoder(settings: RunSettings, *, device: str | None = None) -> FrozenClip:
    """The frozen tower of the settings; `SettingsError` where its patches are not the slicing's."""
    vision = settings.vision
    encoder = FrozenClip.from_pretrained(
        vision.path,
        select_layer=vision.select_layer,
        attention_layers=vision.attention_layers,
        dtype=DTYPES[vision.dtype],
        device=device,
    )
    if encoder.patch_size != settings.slicing.patch_size:
        raise SettingsError(
            f"slicing.patch_size={settings.slicing.patch_size}, but {vision.path} has patches of {encoder.patch_size} pixels"
        )
    return encoder


def cache_identity(settings: RunSettings, encoder: FrozenClip) -> CacheIdentity:
    """The key of the cache that this encoder and these settings make."""
    return CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype=settings.vision.dtype,
        select_layer=settings.vision.select_layer,
        preprocessing=encoder.preprocessing,
        slicing=settings.slicing.model_dump(),
    )


def index_uri(settings: RunSettings) -> str:
    """The dataset index lies beside the caches: both outlive runs."""
    return storage.join(settings.cache_root, "index")


def cache_uri(settings: RunSettings, identity: CacheIdentity) -> str:
    return storage.join(settings.cache_root, identity.key, settings.cache.codec)


def indexed_images(index: DatasetIndex, names: Iterable[str]) -> dict[str, IndexedImage]:
    """What the index says about the pictures of these names; names it does not have are left out."""
    wanted = set(names)
    return {
        row.name: IndexedImage(row.image_key, row.width, row.height, row.reason)
        for row in index.rows()
        if row.name in wanted
    }


def quarantine_into(images: Mapping[str, IndexedImage], quarantined: Mapping[str, str]) -> dict[str, IndexedImage]:
    """The same pictures, with the reasons of those that the encoder refused."""
    return {
        name: IndexedImage(
            image.image_key, image.width, image.height, image.reason or quarantined.get(image.image_key, "")
        )
        for name, image in images.items()
    }


def open_features(
    settings: RunSettings, source: str, *, cache: str, version: int, uris: Mapping[str, str], device: str
) -> FeatureCache | LiveFeatures:
    """The feature source of a worker: the pinned cache version, or the encoder itself."""
    if source == "cache":
        return FeatureCache.open(cache, version=version)
    return LiveFeatures(load_encoder(settings, device=device), uris, pixel_settings(settings))


def uris_by_key(rows: Iterable[IndexRow]) -> dict[str, str]:
    return {row.image_key: row.uri for row in rows if row.status == "ok"}
