"""The folder of a cache: its layout, and the identity with which it was created.

The layout below ``<root>/<cache key>/<codec>/``:

├── identity.json                       encoder, preprocessing, slicing and codec of the features
├── calibration.json                    scales and centres of the codec int8, valid for all files
├── data/<uuid>.parquet                 features, immutable, one row group per image
├── ledger/features-<uuid>.parquet      images of a finished data file, which does not count without this record
├── ledger/quarantine-<uuid>.parquet    images that could not be encoded
├── manifests/v00000001.json            committed versions, each of which names its key index and quarantine table
├── keys/v00000001-<uuid>.parquet       key index of a version
├── quarantine/v00000001-<uuid>.parquet quarantine table of a version
└── pins/<run digest>.json              version on which a run resumes
"""

from dataclasses import dataclass

from meteor import storage
from meteor.cache.codec import check_codec_name
from meteor.cache.identity import CacheIdentity
from meteor.cache.table import check_schema_version
from meteor.constants import CACHE_SCHEMA_VERSION
from meteor.errors import AlreadyExistsError, CacheError, NotFoundError

IDENTITY, CALIBRATION, DATA, LEDGER, MANIFESTS, KEYS, QUARANTINE, PINS = (
    "identity.json",
    "calibration.json",
    "data",
    "ledger",
    "manifests",
    "keys",
    "quarantine",
    "pins",
)


@dataclass(frozen=True)
class CacheInfo:
    """Content of ``identity.json``."""

    identity: CacheIdentity
    codec: str


def create_cache(root_uri: str, identity: CacheIdentity, codec: str) -> str:
    """Create the cache for features of this identity in this codec, or find it if it exists.

    Returns:
        The cache's URI: ``<root>/<identity.key>/<codec>``.

    Raises:
        CacheMismatchError: the folder holds a cache with another identity.
        SettingsError: no codec has this name.
    """
    cache_uri = storage.absolute(storage.join(root_uri, identity.key, check_codec_name(codec)))
    content = {
        "schema_version": CACHE_SCHEMA_VERSION,
        "key": identity.key,
        "codec": codec,
        "identity": identity.to_dict(),
    }
    try:
        storage.create_bytes(storage.join(cache_uri, IDENTITY), storage.json_bytes(content))
    except AlreadyExistsError:
        read_cache_info(cache_uri).identity.require_match(identity)
    return cache_uri


def read_cache_info(cache_uri: str) -> CacheInfo:
    """Read identity and codec of the cache.

    Raises:
        CacheError: the cache does not exist, or a newer release made it.
    """
    uri = storage.join(cache_uri, IDENTITY)
    try:
        content = storage.read_json(uri)
    except NotFoundError as error:
        raise CacheError(
            f"{cache_uri} holds no feature cache; run cache_features, or correct the URI (<root>/<key>/<codec>)"
        ) from error
    check_schema_version(uri, content["schema_version"], CACHE_SCHEMA_VERSION)
    return CacheInfo(CacheIdentity.from_dict(content["identity"]), content["codec"])
