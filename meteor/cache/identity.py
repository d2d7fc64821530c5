"""What makes two feature caches the same numbers: the cache key and the fields behind it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from meteor.constants import ENCODING_VERSION, RESIZING_VERSION, SLICING_VERSION
from meteor.errors import CacheError, CacheMismatchError
from meteor.formatting import flatten

_PREPROCESSING = ("mean", "std", "rescale")
_SLICING = ("max_slices", "resolution", "patch_size")
_VERSIONS = ("slicing", "resizing", "encoding")


def algorithm_versions() -> dict[str, int]:
    """The versions of this library's algorithms that decide about a feature's value."""
    return {"slicing": SLICING_VERSION, "resizing": RESIZING_VERSION, "encoding": ENCODING_VERSION}


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that decides about a feature's value, and nothing else.

    Not part of it: the codec (the same numbers, stored otherwise), the attention layers (a reader asks for those it
    needs), the schema version (newer readers read older files), the refusal of extreme aspect ratios (a policy).

    Attributes:
        encoder_digest: fingerprint of the frozen encoder's weights.
        encoder_dtype: the type it computes in; bfloat16 and float32 differ more than a codec's error.
        select_layer: the hidden state that is cached, for example -2.
        preprocessing: ``mean``, ``std`` (three numbers each) and ``rescale``.
        slicing: ``max_slices``, ``resolution`` and ``patch_size`` of the slicing rule.
        versions: versions of the algorithms ``slicing``, ``resizing`` and ``encoding``.

    Raises:
        CacheError: a field is missing or unknown.
    """

    encoder_digest: str
    encoder_dtype: str
    select_layer: int
    preprocessing: Mapping[str, Any]
    slicing: Mapping[str, int]
    versions: Mapping[str, int] = field(default_factory=algorithm_versions)

    def __post_init__(self) -> None:
        for name, expected in [("preprocessing", _PREPROCESSING), ("slicing", _SLICING), ("versions", _VERSIONS)]:
            given = getattr(self, name)
            if set(given) != set(expected):
                raise CacheError(f"{name} of a cache identity needs exactly {list(expected)}, got {sorted(given)}")
            object.__setattr__(self, name, dict(given))
        # 0 and 0.0, list and tuple must not make two keys of one preprocessing.
        for name in ("mean", "std"):
            self.preprocessing[name] = [float(number) for number in self.preprocessing[name]]  # type: ignore[index]

    @property
    def key(self) -> str:
        """The cache key: sha256 over the canonical JSON of all fields, 64 hexadecimal digits."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CacheIdentity":
        """The inverse of `to_dict`. Raises CacheError where a field is missing or unknown."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise CacheError(f"these are not the fields of a cache identity: {sorted(fields)} ({error})") from error

    def differences(self, other: "CacheIdentity") -> list[str]:
        """One line for each field that differs, such as ``"select_layer: -2 != -1"``; this one's value first."""
        mine, others = flatten(self.to_dict()), flatten(other.to_dict())
        return [f"{name}: {mine[name]} != {others[name]}" for name in mine if mine[name] != others[name]]

    def require_match(self, other: "CacheIdentity") -> None:
        """Check that the cache with this identity serves what needs ``other``.

        Raises:
            CacheMismatchError: naming the fields that differ.
        """
        if differences := self.differences(other):
            raise CacheMismatchError(
                f"the cache does not fit: {'; '.join(differences)} (cache != needed). "
                "Choose the cache that was made with these settings, or run cache_features with them"
            )
