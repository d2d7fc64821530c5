"""The feature cache: outputs of the frozen encoder for each image, computed once, stored as Parquet on disk or S3."""

from meteor.cache.calibration import CALIBRATION_IMAGES, calibrate, needs_calibration, open_codec
from meteor.cache.codec import CODEC_NAMES, DEFAULT_CODEC, Codec, get_codec
from meteor.cache.folder import create_cache
from meteor.cache.identity import CacheIdentity, algorithm_versions
from meteor.cache.index import DatasetIndex, IndexRow
from meteor.cache.manifest import commit
from meteor.cache.packing import encode_row
from meteor.cache.pins import pins, unpin
from meteor.cache.quality import summarise_errors
from meteor.cache.quarantine import QuarantineRow, record_quarantine, retryable
from meteor.cache.row import FEATURE_SCHEMA, read_row
from meteor.cache.store import FeatureCache
from meteor.cache.writer import FileRecord, write_feature_file

__all__ = [
    "CALIBRATION_IMAGES",
    "CODEC_NAMES",
    "DEFAULT_CODEC",
    "FEATURE_SCHEMA",
    "CacheIdentity",
    "Codec",
    "DatasetIndex",
    "FeatureCache",
    "FileRecord",
    "IndexRow",
    "QuarantineRow",
    "algorithm_versions",
    "calibrate",
    "commit",
    "create_cache",
    "encode_row",
    "get_codec",
    "needs_calibration",
    "open_codec",
    "pins",
    "read_row",
    "record_quarantine",
    "retryable",
    "summarise_errors",
    "unpin",
    "write_feature_file",
]
