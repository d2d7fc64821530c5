"""The folder of one cache: what lies where in it, and the identity it was created with.

<root>/<cache key>/<codec>/
    identity.json                       whose numbers these are
    calibration.json                    scales and centres of the codec int8, the same for all files
    data/<uuid>.parquet                 features, immutable, one row group for each image
    ledger/features-<uuid>.parquet      what a finished data file holds; without it the data file does not count
    ledger/quarantine-<uuid>.parquet    images that could not be encoded
    manifests/v00000001.json            committed versions, each naming its key index and quarantine:
    keys/v00000001-<uuid>.parquet
    quarantine/v00000001-<uuid>.parquet
    pins/<run digest>.json              the version a run resumes on
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
    """What ``identity.json`` says."""

    identity: CacheIdentity
    codec: str


def create_cache(root_uri: str, identity: CacheIdentity, codec: str) -> str:
    """The folder for features of this identity in this codec, made if it is not there yet.

    Returns:
        The cache's URI: ``<root>/<identity.key>/<codec>``.

    Raises:
        CacheMismatchError: the folder holds a cache of another identity.
        SettingsError: there is no such codec.
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
    """Identity and codec of the cache.

    Raises:
        CacheError: there is no cache, or a newer release made it.
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
