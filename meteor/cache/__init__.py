"""The feature cache: what the frozen encoder sees in each image, computed once, kept as Parquet on disk or S3."""

from meteor.cache.codec import DEFAULT_CODEC, get_codec
from meteor.cache.folder import create_cache
from meteor.cache.identity import CacheIdentity, algorithm_versions
from meteor.cache.index import DatasetIndex, IndexRow
from meteor.cache.manifest import commit
from meteor.cache.quarantine import QuarantineRow, record_quarantine
from meteor.cache.row import FEATURE_SCHEMA, ImageFeatures, encode_row, read_row
from meteor.cache.store import FeatureCache, read_pin
from meteor.cache.writer import FileRecord, write_feature_file

__all__ = [
    "DEFAULT_CODEC",
    "FEATURE_SCHEMA",
    "CacheIdentity",
    "DatasetIndex",
    "FeatureCache",
    "FileRecord",
    "ImageFeatures",
    "IndexRow",
    "QuarantineRow",
    "algorithm_versions",
    "commit",
    "create_cache",
    "encode_row",
    "get_codec",
    "read_pin",
    "read_row",
    "record_quarantine",
    "write_feature_file",
]
