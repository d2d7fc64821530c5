"""The feature cache: what the frozen encoder sees in each image, computed once, kept as Parquet on disk or S3."""

from meteor.cache.calibration import CALIBRATION_PICTURES, calibrate, needs_calibration, open_codec
from meteor.cache.codec import CODEC_NAMES, DEFAULT_CODEC, Codec, get_codec
from meteor.cache.compare import CacheDiff, diff_caches
from meteor.cache.export import export_pictures
from meteor.cache.folder import create_cache
from meteor.cache.gc import plan_gc, run_gc
from meteor.cache.gc_plan import GcPlan, GcReport
from meteor.cache.identity import CacheIdentity, algorithm_versions
from meteor.cache.index import DatasetIndex, IndexRow
from meteor.cache.listing import CacheListing, list_caches
from meteor.cache.manifest import commit
from meteor.cache.packing import encode_row
from meteor.cache.pins import pins, read_pin, unpin
from meteor.cache.quality import summarise_errors
from meteor.cache.quarantine import QuarantineRow, record_quarantine, retryable
from meteor.cache.repair import Repair, repair
from meteor.cache.row import FEATURE_SCHEMA, ImageFeatures, read_row
from meteor.cache.store import FeatureCache
from meteor.cache.transcode import transcode
from meteor.cache.writer import FileRecord, write_feature_file

__all__ = [
    "CALIBRATION_PICTURES",
    "CODEC_NAMES",
    "DEFAULT_CODEC",
    "FEATURE_SCHEMA",
    "CacheDiff",
    "CacheIdentity",
    "CacheListing",
    "Codec",
    "DatasetIndex",
    "FeatureCache",
    "FileRecord",
    "GcPlan",
    "GcReport",
    "ImageFeatures",
    "IndexRow",
    "QuarantineRow",
    "Repair",
    "algorithm_versions",
    "calibrate",
    "commit",
    "create_cache",
    "diff_caches",
    "encode_row",
    "export_pictures",
    "get_codec",
    "list_caches",
    "needs_calibration",
    "open_codec",
    "pins",
    "plan_gc",
    "read_pin",
    "read_row",
    "record_quarantine",
    "repair",
    "retryable",
    "run_gc",
    "summarise_errors",
    "transcode",
    "unpin",
    "write_feature_file",
]
