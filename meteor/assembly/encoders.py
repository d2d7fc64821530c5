"""Frozen encoder that settings name, and identity of its cache."""

import torch

from meteor.cache import CacheIdentity
from meteor.config import RunSettings
from meteor.errors import SettingsError
from meteor.vision.encoder import FrozenClip


def load_encoder(settings: RunSettings, *, device: str | None = None) -> FrozenClip:
    """Load the frozen encoder at ``vision.path``.

    Raises:
        SettingsError: there is no encoder at that path, or its patch size differs from ``slicing.patch_size``.
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
    """Return the identity of the cache that this encoder fills with these settings."""
    return CacheIdentity(
        encoder_digest=encoder.weights_digest,
        encoder_dtype=settings.vision.dtype,
        select_layer=settings.vision.select_layer,
        preprocessing=encoder.preprocessing,
        slicing=settings.slicing.model_dump(),
    )
