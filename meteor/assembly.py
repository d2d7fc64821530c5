"""From a run's settings to what several commands and stages share: sizes of pixels, the encoder, places of caches."""

import torch

from meteor import storage
from meteor.cache import CacheIdentity
from meteor.config import RunSettings
from meteor.data.features import PixelSettings
from meteor.errors import SettingsError
from meteor.vision.encoder import FrozenClip


def sample_uris(settings: RunSettings) -> dict[str, str]:
    """Name -> annotation file of every sample set that the run names.

    Raises:
        SettingsError: the run names none.
    """
    data = settings.data
    named = {"pretrain": data.pretrain, "finetune": data.finetune, **data.evaluate}
    uris = {name: uri for name, uri in named.items() if uri}
    if not uris:
        raise SettingsError("the run names no samples: set data.pretrain, data.finetune or data.evaluate")
    return uris


def pixel_settings(settings: RunSettings) -> PixelSettings:
    """What decides about the encoder's pixels, and about the pictures it refuses."""
    slicing, data = settings.slicing, settings.data
    return PixelSettings(
        max_slices=slicing.max_slices,
        resolution=slicing.resolution,
        patch_size=slicing.patch_size,
        max_aspect_ratio=data.max_aspect_ratio,
        max_pixels=data.max_pixels,
    )


def load_encoder(settings: RunSettings, *, device: str | None = None) -> FrozenClip:
    """The frozen tower of the settings.

    Raises:
        SettingsError: there is none at that path, or its patches are not the slicing's.
    """
    vision = settings.vision
    encoder = FrozenClip.from_pretrained(
        vision.path,
        select_layer=vision.select_layer,
        attention_layers=vision.attention_layers,
        dtype=getattr(torch, vision.dtype),
        device=device,
    )
    if encoder.patch_size != settings.slicing.patch_size:
        raise SettingsError(
            f"slicing.patch_size={settings.slicing.patch_size}, but {vision.path} has patches of {encoder.patch_size} pixels"
        )
    return encoder


def cache_identity(settings: RunSettings, encoder: FrozenClip) -> CacheIdentity:
    """The identity of the cache that this encoder and these settings make."""
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
    """The variant of the cache that the run reads and fills."""
    return storage.join(settings.cache_root, identity.key, settings.cache.codec)
