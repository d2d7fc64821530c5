"""How patch features become bytes: codecs by name. P patches of a sub-image, C vision width."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from meteor.errors import BadImageError, SettingsError


class Codec(Protocol):
    """Stores one sub-image's features; sub-images of an image are laid one after the other."""

    @property
    def name(self) -> str:
        """Name in settings and in the cache's path."""
        ...

    def size_bytes(self, num_patches: int, width: int) -> int:
        """Bytes of a (num_patches, width) tensor."""
        ...

    def encode(self, feature_PC: torch.Tensor) -> bytes:
        """The bytes of a (P, C) tensor of any float type and device.

        Raises:
            BadImageError: a value is not finite, or too large for the codec.
        """
        ...

    def decode(self, payload: bytearray | memoryview, num_patches: int, width: int) -> torch.Tensor:
        """The (P, C) tensor of exactly `size_bytes` writable bytes."""
        ...


@dataclass(frozen=True)
class FloatCodec:
    """A (P, C) tensor row-major in one floating type, little-endian; decoding shares the payload's memory."""

    name: str
    dtype: torch.dtype

    def size_bytes(self, num_patches: int, width: int) -> int:
        return num_patches * width * self.dtype.itemsize

    def encode(self, feature_PC: torch.Tensor) -> bytes:
        return tensor_bytes("features", feature_PC, self.dtype)

    def decode(self, payload: bytearray | memoryview, num_patches: int, width: int) -> torch.Tensor:
        return tensor_over(payload, self.dtype, (num_patches, width))


_CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        codec.name: codec
        for codec in (
            FloatCodec("float16", torch.float16),
            FloatCodec("bfloat16", torch.bfloat16),
            FloatCodec("float32", torch.float32),
        )
    }
)
DEFAULT_CODEC = "float16"


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises SettingsError for an unknown one."""
    if name not in _CODECS:
        raise SettingsError(f"cache.codec={name!r} is unknown; choose one of {', '.join(_CODECS)}")
    return _CODECS[name]


def tensor_bytes(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """The tensor's values in ``dtype``, row-major.

    Raises:
        BadImageError: a value is not finite in ``dtype`` (reason ``"non_finite_features"``).
    """
    values = tensor.detach().to(dtype)
    check_finite(name, values)
    return values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse a picture whose features cannot be used. Raises BadImageError with reason ``"non_finite_features"``."""
    # The extremes say it 25 times faster than a look at each value: NaN spreads to both, infinity is one of them.
    if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        num_bad = int((~torch.isfinite(values)).sum())
        raise BadImageError(
            "non_finite_features",
            f"{num_bad} of {values.numel()} values of {name} are not finite as {values.dtype}: the encoder failed "
            "on this picture, or its values are too large for the codec (bfloat16 and float32 have the range)",
        )


def tensor_over(payload: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over the payload's memory, which must be writable and of the shape's size."""
    if not len(payload):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(shape)
