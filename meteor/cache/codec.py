"""Codecs, which turn patch features into bytes. Letters: P patches of a sub-image, R patches at once, C vision width."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from meteor.cache.buffers import PAYLOAD_MEMORY
from meteor.errors import BadImageError, CacheError, SettingsError

DEFAULT_CODEC = "float16"
INT8_CODEC = "int8"
# -128 is not used, so that the values are symmetric about the centre.
INT8_LIMIT = 127
# Patches converted at once (R). Intermediate float32 values of a whole sub-image need fresh memory every time: an image of
# 5 x 576 x 1024 took 13 ms to decode as a whole and 0.9 ms in pieces of this many patches.
ROWS_AT_ONCE = 128


class Codec(Protocol):
    """Conversion between a sub-image's features and bytes; the bytes of an image's sub-images are concatenated."""

    @property
    def name(self) -> str:
        """Name in settings and in the cache's path."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        ...

    @property
    def calibration_digest(self) -> str:
        """Digest of the calibration; empty for a codec without calibration."""
        ...

    def size_bytes(self, num_patches: int, width: int) -> int:
        """Return the number of bytes for a (num_patches, width) tensor."""
        ...

    def pack(self, feature_PC: torch.Tensor, out_PC: torch.Tensor) -> None:
        """Convert a tensor of any float dtype into a contiguous ``out_PC`` of `dtype` on its device, without checks."""
        ...

    def unpack(self, stored_PC: torch.Tensor) -> torch.Tensor:
        """Convert packed values back to features, on their device."""
        ...

    def encode(self, feature_PC: torch.Tensor) -> bytes:
        """Encode a (P, C) tensor of any float dtype and device as bytes.

        Raises:
            BadImageError: a value is not finite, or too large for the codec.
        """
        ...

    def decode(self, payload: bytearray | memoryview, num_patches: int, width: int) -> torch.Tensor:
        """Decode exactly `size_bytes` writable bytes to a (P, C) tensor."""
        ...


@dataclass(frozen=True)
class FloatCodec:
    """Codec that stores a (P, C) tensor row by row in a little-endian float dtype; decoding shares the payload's memory."""

    name: str
    dtype: torch.dtype

    @property
    def calibration_digest(self) -> str:
        return ""

    def size_bytes(self, num_patches: int, width: int) -> int:
        return num_patches * width * self.dtype.itemsize

    def pack(self, feature_PC: torch.Tensor, out_PC: torch.Tensor) -> None:
        out_PC.copy_(feature_PC.detach())

    def unpack(self, stored_PC: torch.Tensor) -> torch.Tensor:
        return stored_PC

    def encode(self, feature_PC: torch.Tensor) -> bytes:
        return _encode(self, feature_PC)

    def decode(self, payload: bytearray | memoryview, num_patches: int, width: int) -> torch.Tensor:
        return tensor_over(payload, self.dtype, (num_patches, width))


@dataclass(frozen=True, eq=False)
class Int8Codec:
    """Codec that stores a (P, C) tensor row by row in int8 and reads it as float16, with a scale and centre per channel.

    A value is stored * scale + centre. Values outside a channel's calibrated range are clipped.

    Attributes:
        scales: (C) float32, difference between neighbouring stored values; 0 for a constant channel.
        centres: (C) float32, value for which the stored 0 stands.
        calibration_digest: digest of the calibration with these scales and centres.
    """

    scales: torch.Tensor
    centres: torch.Tensor
    calibration_digest: str

    @property
    def name(self) -> str:
        return INT8_CODEC

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def size_bytes(self, num_patches: int, width: int) -> int:
        return num_patches * width

    def pack(self, feature_PC: torch.Tensor, out_PC: torch.Tensor) -> None:
        self._check_width(feature_PC)
        _, inverse_C, centre_C = _on_device(self, feature_PC.device)
        pieces = (tensor_PC.split(ROWS_AT_ONCE) for tensor_PC in (feature_PC.detach(), out_PC))
        for feature_RC, out_RC in zip(*pieces, strict=True):
            # Subtract the centre first: far from zero, the difference of two products would lose its digits.
            step_RC = torch.sub(feature_RC, centre_C).mul_(inverse_C)
            out_RC.copy_(step_RC.round_().clamp_(-INT8_LIMIT, INT8_LIMIT))

    def unpack(self, stored_PC: torch.Tensor) -> torch.Tensor:
        return self._unpack_into(stored_PC, torch.empty_like(stored_PC, dtype=torch.float16))

    def _unpack_into(self, stored_PC: torch.Tensor, out_PC: torch.Tensor) -> torch.Tensor:
        self._check_width(stored_PC)
        scale_C, _, centre_C = _on_device(self, stored_PC.device)
        # `addcmul` computes in the float32 of scales and centres, and rounds to float16 only when it writes the result.
        for stored_RC, out_RC in zip(stored_PC.split(ROWS_AT_ONCE), out_PC.split(ROWS_AT_ONCE), strict=True):
            torch.addcmul(centre_C, stored_RC, scale_C, out=out_RC)
        return out_PC

    def encode(self, feature_PC: torch.Tensor) -> bytes:
        return _encode(self, feature_PC)

    def decode(self, payload: bytearray | memoryview, num_patches: int, width: int) -> torch.Tensor:
        stored_PC = tensor_over(payload, self.dtype, (num_patches, width))
        out = PAYLOAD_MEMORY.take(torch.float16.itemsize * stored_PC.numel())
        return self._unpack_into(stored_PC, tensor_over(out, torch.float16, (num_patches, width)))

    def _check_width(self, tensor_PC: torch.Tensor) -> None:
        if tensor_PC.shape[-1] != len(self.scales):
            raise CacheError(
                f"the calibration of this {self.name} cache has {len(self.scales)} channels, the features have "
                f"{tensor_PC.shape[-1]}: they come from another encoder, or the calibration file was replaced"
            )


_FLOAT_CODECS: Mapping[str, FloatCodec] = MappingProxyType(
    {
        codec.name: codec
        for codec in (
            FloatCodec(DEFAULT_CODEC, torch.float16),
            FloatCodec("bfloat16", torch.bfloat16),
            FloatCodec("float32", torch.float32),
        )
    }
)
CODEC_NAMES = (*_FLOAT_CODECS, INT8_CODEC)


def check_codec_name(name: str) -> str:
    """Return the name of a codec unchanged. Raises SettingsError if no codec has this name."""
    if name not in CODEC_NAMES:
        raise SettingsError(f"cache.codec={name!r} is unknown; choose one of {', '.join(CODEC_NAMES)}")
    return name


def get_codec(name: str) -> Codec:
    """Return a codec that needs no calibration by its name.

    Raises:
        SettingsError: no codec has this name.
        CacheError: the codec needs the calibration of a cache.
    """
    if check_codec_name(name) == INT8_CODEC:
        raise CacheError(f"{name} is calibrated for each cache: use meteor.cache.open_codec(cache_uri)")
    return _FLOAT_CODECS[name]


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse an image whose features cannot be used. Raises BadImageError with reason ``"non_finite_features"``."""
    # Looking at the extremes is 25 times faster than at every value: NaN spreads to both, and infinity is an extreme.
    if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        num_bad = int((~torch.isfinite(values)).sum())
        raise BadImageError(
            "non_finite_features",
            f"{num_bad} of {values.numel()} values of {name} are not finite as {values.dtype}: the encoder failed "
            "on this image, or its values are too large for the codec (bfloat16 and float32 have a larger range)",
        )


def tensor_over(payload: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a tensor that shares the payload's memory, which must be writable and have the shape's size."""
    # `torch.frombuffer` refuses empty buffers.
    if not len(payload):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(shape)


def _encode(codec: Codec, feature_PC: torch.Tensor) -> bytes:
    stored_PC = torch.empty(feature_PC.shape, dtype=codec.dtype, device=feature_PC.device)
    codec.pack(feature_PC, stored_PC)
    # Rounding to integers hides values that are not finite, so the features themselves are checked.
    check_finite("features", stored_PC if stored_PC.is_floating_point() else feature_PC)
    return stored_PC.cpu().view(torch.uint8).numpy().tobytes()


@functools.lru_cache(maxsize=16)
def _on_device(codec: Int8Codec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales, their reciprocals (0 for a constant channel) and centres on a device."""
    scale_C = codec.scales.to(device)
    return scale_C, torch.where(scale_C > 0, 1 / scale_C, 0), codec.centres.to(device)
