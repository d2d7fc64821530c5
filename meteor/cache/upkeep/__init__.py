"""Upkeep of feature caches: listing, comparing, converting, repairing and cleaning them."""

from meteor.cache.upkeep.compare import CacheDiff, diff_caches
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
    "list_caches",
    "plan_gc",
    "repair",
    "run_gc",
    "transcode",
]
