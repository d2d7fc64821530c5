"""Frozen encoder that settings name, and identity of its cache."""

import torch

from meteor.assembly.places import encoder_slicing
from meteor.cache import CacheIdentity
from meteor.config import RunSettings
from meteor.errors import SettingsError
from meteor.vision.encoder import FrozenEncoder


def load_encoder(settings: RunSettings, *, device: str | None = None) -> FrozenEncoder:
    """Load the frozen encoder at ``vision.path``.

    Raises:
        SettingsError: there is no supported encoder at that path, it lacks a layer or the importance row, or its patch size
            differs from ``slicing.patch_size``.
    """
    vision = settings.vision
    encoder = FrozenEncoder.from_pretrained(
        vision.path,
        select_layer=vision.select_layer,
        attention_layers=vision.attention_layers,
        importance=vision.importance,
        dtype=getattr(torch, vision.dtype),
        device=device,
    )
    if settings.slicing.patch_size not in (None, encoder.patch_size):
        raise SettingsError(
            f"slicing.patch_size={settings.slicing.patch_size}, but {vision.path} has patches of {encoder.patch_size} pixels"
        )
    return encoder


def cache_identity(settings: RunSettings, encoder: FrozenEncoder) -> CacheIdentity:
    """Return the identity of the cache that this encoder fills with these settings."""
    slicing = encoder_slicing(settings)
    resample = slicing.pop("resample")
    return CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype=settings.vision.dtype,
        select_layer=settings.vision.select_layer,
        preprocessing=encoder.preprocessing,
        slicing=slicing,
        importance=encoder.importance,
        resample=resample,
    )
