"""Cached images as plain `.safetensors` files, for programs that know nothing of this cache."""

from collections.abc import Mapping, Sequence

import safetensors.torch
import torch

from meteor import storage
from meteor.cache.store import FeatureCache
from meteor.errors import CacheError
from meteor.features import ImageFeatures

_SUFFIX = ".safetensors"
_NUM_SHOWN = 5


def export_images(
    cache: FeatureCache, keys: Sequence[str], folder_uri: str, *, names: Mapping[str, str] | None = None
) -> list[str]:
    """Write one file for each image, complete in itself.

    Letters: P patches of a sub-image, C vision width, A attention layers, S sub-images, the global view first.

    Its tensors: ``features`` (sum of P, C), ``cls_attention`` (A, sum of P), ``cls`` (S, C), ``patch_grids`` (S, 2)
    int32. Its metadata, all strings: ``image_key``, ``width``, ``height``, ``grid`` ("columns,rows", empty when the
    image is not sliced), ``attention_layers`` ("-2,-5"), ``cache_key``, ``codec``, ``version``. To divide it again::

        tensors = safetensors.torch.load_file(path)
        num_patches = tensors["patch_grids"].prod(dim=1).tolist()
        features = tensors["features"].split(num_patches)
        cls_attention = tensors["cls_attention"].split(num_patches, dim=1)

    Args:
        cache: the cache.
        keys: image keys.
        folder_uri: local or s3://; files that are there already are replaced.
        names: name of an image's file below the folder, without ".safetensors", by image key; the key where none is given.

    Returns:
        The files' URIs, in the order of ``keys``.

    Raises:
        CacheError: a key is not in the cache, or two images would have one name; nothing was written then.
    """
    if missing := [key for key in keys if key not in cache]:
        raise CacheError(
            f"{len(missing)} of {len(keys)} images are not in version {cache.version} of {cache.uri}: "
            f"{', '.join(missing[:_NUM_SHOWN])}; `meteor cache ls` lists those that are"
        )
    files = {key: f"{(names or {}).get(key, key)}{_SUFFIX}" for key in keys}
    if len(set(files.values())) < len(files):
        repeated = sorted(name for name in set(files.values()) if list(files.values()).count(name) > 1)
        raise CacheError(f"several images would be written to {', '.join(repeated[:_NUM_SHOWN])}; give other names")
    uris = []
    for key in keys:
        uris.append(storage.join(folder_uri, files[key]))
        storage.write_bytes(uris[-1], _image_bytes(cache.get(key), cache))
    return uris


def _image_bytes(image: ImageFeatures, cache: FeatureCache) -> bytes:
    tensors = {
        "features": torch.cat(image.features),
        "cls_attention": torch.cat(image.cls_attention, dim=1),
        "cls": image.cls,
        "patch_grids": torch.tensor(image.patch_grids, dtype=torch.int32),
    }
    metadata = {
        "image_key": image.image_key,
        "width": str(image.width),
        "height": str(image.height),
        "grid": ",".join(map(str, image.grid or ())),
        "attention_layers": ",".join(map(str, image.attention_layers)),
        "cache_key": cache.identity.key,
        "codec": cache.codec,
        "version": str(cache.version),
    }
    return safetensors.torch.save(tensors, metadata)
