"""Upkeep of feature caches: listing, comparing, converting, exporting, repairing and cleaning them."""

from meteor.cache.upkeep.compare import CacheDiff, diff_caches
from meteor.cache.upkeep.export import export_images
from meteor.cache.upkeep.gc import plan_gc, run_gc
from meteor.cache.upkeep.gc_plan import GcPlan, GcReport
from meteor.cache.upkeep.listing import CacheListing, list_caches
from meteor.cache.upkeep.repair import Repair, repair
from meteor.cache.upkeep.transcode import transcode

__all__ = [
    "CacheDiff",
    "CacheListing",
    "GcPlan",
    "GcReport",
    "Repair",
    "diff_caches",
    "export_images",
    "list_caches",
    "plan_gc",
    "repair",
    "run_gc",
    "transcode",
]
