"""The identity of a feature cache: all fields that decide about its numbers, and the cache key made from them."""

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
# Fields that caches of CLIP's features lacked when CLIP was the only encoder: these values leave a cache's key as it was.
_UNWRITTEN = {"importance": "class_token", "resample": "bicubic"}


def algorithm_versions() -> dict[str, int]:
    """Return the versions of this library's algorithms that decide about a feature's value."""
    return {"slicing": SLICING_VERSION, "resizing": RESIZING_VERSION, "encoding": ENCODING_VERSION}


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that decides about a feature's value, and nothing else.

    These are not part of the identity:

    - the codec, which stores these numbers in another form
    - the attention layers, among which readers choose
    - the schema version, because newer readers read older files
    - the refusal of extreme aspect ratios, which excludes images but changes no feature

    Attributes:
        encoder_digest: digest of the frozen encoder's weights.
        encoder_dtype: dtype of the encoder's arithmetic; bfloat16 and float32 differ by more than a codec's error.
        select_layer: hidden state that is cached, for example -2.
        preprocessing: ``mean``, ``std`` (three numbers each) and ``rescale``.
        slicing: ``max_slices``, ``resolution`` and ``patch_size`` of the slicing rule.
        versions: versions of the algorithms ``slicing``, ``resizing`` and ``encoding``.
        importance: kind of the importance row that is cached as ``cls_attention``, see `meteor.vision.towers.Importance`.
        resample: filter that resized the images.

    Raises:
        CacheError: a field is missing or unknown.
    """

    encoder_digest: str
    encoder_dtype: str
    select_layer: int
    preprocessing: Mapping[str, Any]
    slicing: Mapping[str, int]
    versions: Mapping[str, int] = field(default_factory=algorithm_versions)
    importance: str = "class_token"
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        for name, expected in [("preprocessing", _PREPROCESSING), ("slicing", _SLICING), ("versions", _VERSIONS)]:
            given = getattr(self, name)
            if set(given) != set(expected):
                raise CacheError(f"{name} of a cache identity needs exactly {list(expected)}, got {sorted(given)}")
            object.__setattr__(self, name, dict(given))
        # Equal preprocessing must give equal keys, whether numbers come as 0 or 0.0 and in a list or a tuple.
        for name in ("mean", "std"):
            self.preprocessing[name] = [float(number) for number in self.preprocessing[name]]  # type: ignore[index]

    @property
    def key(self) -> str:
        """The cache key: sha256 over the canonical JSON of all fields, 64 hexadecimal digits."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without those of `_UNWRITTEN` that have the value given there."""
        return {name: value for name, value in asdict(self).items() if _UNWRITTEN.get(name) != value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CacheIdentity":
        """Make an identity from the result of `to_dict`. Raises CacheError if a field is missing or unknown."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise CacheError(f"these are not the fields of a cache identity: {sorted(fields)} ({error})") from error

    def differences(self, other: "CacheIdentity") -> list[str]:
        """Return a line for each field that differs, such as ``"select_layer: -2 != -1"``, with this identity's value first."""
        mine, others = flatten(asdict(self)), flatten(asdict(other))
        return [f"{name}: {mine[name]} != {others[name]}" for name in mine if mine[name] != others[name]]

    def require_match(self, other: "CacheIdentity") -> None:
        """Check that a cache with this identity fits a model that needs ``other``.

        Raises:
            CacheMismatchError: fields differ; the message names them.
        """
        if differences := self.differences(other):
            raise CacheMismatchError(
                f"the cache does not fit: {'; '.join(differences)} (cache != needed). "
                "Choose the cache that was made with these settings, or run cache_features with them"
            )
