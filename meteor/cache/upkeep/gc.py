"""Clean-up of a cache: superseded versions, files without live rows, and remains of crashed writers.

A plan lists the files to delete with reasons. Its execution makes a fresh plan and deletes only files that both plans name.
A file is deleted after everything that refers to it. A reader therefore never sees a version whose files are gone, and
after a crash the next run finishes the work. Ages are counted by the store's clock.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from meteor import storage
from meteor.cache.folder import DATA, KEYS, LEDGER, MANIFESTS, QUARANTINE, read_cache_info
from meteor.cache.ledger import FEATURES_PREFIX, record_of
from meteor.cache.upkeep.compaction import compact, plan_compactions
from meteor.cache.upkeep.deletion import Deleter
from meteor.cache.upkeep.gc_plan import UNFINISHED, UNNAMED, Deletion, GcPlan, GcReport
from meteor.cache.upkeep.usage import Usage, read_usage

DAY_S = 24 * 3600.0
# A partial file this old belongs to no write that is still going on, and nothing but its age tells.
_LONGEST_WRITE_S = 3600.0
# Each deletion on S3 is a round trip, so threads save most of the time.
_NUM_DELETERS = 16
# Order of deletion: files of a folder may refer only to files of folders behind it.
_ORDER = (MANIFESTS, KEYS, QUARANTINE, LEDGER, DATA)


def plan_gc(cache_uri: str, *, older_than_s: float = DAY_S, now_s: float | None = None) -> GcPlan:
    """Find the files that no version or writer needs, without changing anything.

    The plan keeps:

    - the latest version, pinned versions, and versions superseded less than ``older_than_s`` ago, with all their files
    - data files that the next commit will merge
    - all files younger than ``older_than_s``

    A writer may therefore take up to ``older_than_s`` from a file to the record that makes it count, and a reader may use a
    superseded version for this time.

    Args:
        cache_uri: URI of the cache.
        older_than_s: least age of a file to delete; unfinished writes must be an hour old in any case.
        now_s: time from which ages are counted, in epoch seconds; None for the store's clock.

    Raises:
        CacheError: the cache does not exist, or a version to be kept is damaged, so its files are unknown.
        StorageError: a pin is damaged.
    """
    cache_uri = storage.absolute(cache_uri)
    read_cache_info(cache_uri)
    now_s = storage.now_s(cache_uri) if now_s is None else now_s
    usage = read_usage(cache_uri, before_s=now_s - older_than_s)
    return GcPlan(
        cache_uri=cache_uri,
        older_than_s=older_than_s,
        now_s=now_s,
        latest=usage.latest,
        kept_versions=tuple(sorted(usage.kept_versions.items(), reverse=True)),
        deletions=tuple(
            sorted(_deletions(usage), key=lambda deletion: (_ORDER.index(_folder(deletion.file)), deletion.file))
        ),
        compactions=tuple(plan_compactions(usage)),
        leftovers=tuple(_leftovers(cache_uri, older_than_s, dry_run=True)),
        num_files=len(usage.files),
        num_bytes=sum(info.size_bytes for info in usage.files.values()),
    )


def run_gc(plan: GcPlan, *, on_progress: Callable[[int, int], None] | None = None) -> GcReport:
    """Carry out a plan, except for files that are needed by now.

    Args:
        plan: result of `plan_gc`.
        on_progress: called with the number of deleted files and of all files to delete.

    Raises:
        CacheError: a run pinned a version while it was being deleted. The version is restored, and its files still exist.
    """
    # Between plan and execution a run may have pinned a version, or a commit may have merged a file.
    fresh = plan_gc(plan.cache_uri, older_than_s=plan.older_than_s, now_s=plan.now_s)
    still_unneeded = set(fresh.deletions)
    deletions = [deletion for deletion in plan.deletions if deletion in still_unneeded]
    deleted = _delete(plan.cache_uri, fresh.latest, deletions, on_progress)
    leftovers = _leftovers(plan.cache_uri, plan.older_than_s, dry_run=False)
    to_compact = {compaction.file for compaction in fresh.compactions}
    version, num_compacted, notes = compact(
        plan.cache_uri, [compaction.file for compaction in plan.compactions if compaction.file in to_compact]
    )
    if num_kept := len(plan.deletions) - len(deleted):
        notes = [f"{num_kept} files of the plan were kept, because they are needed by now", *notes]
    return GcReport(
        num_deleted=len(deleted),
        deleted_bytes=sum(deletion.size_bytes for deletion in deleted),
        num_compacted=num_compacted,
        num_leftovers=len(leftovers),
        version=version,
        notes=tuple(notes),
    )


def _delete(
    cache_uri: str, latest: int, deletions: list[Deletion], on_progress: Callable[[int, int], None] | None
) -> list[Deletion]:
    """Delete the files folder by folder, and return the deletions that took place."""
    by_folder = [[deletion for deletion in deletions if _folder(deletion.file) == folder] for folder in _ORDER]
    deleter = Deleter(cache_uri, latest)
    deleter.delete_versions([deletion.file for deletion in by_folder[0]])
    deleted, num_done = list(by_folder[0]), len(by_folder[0])
    for some in by_folder[1:]:
        with ThreadPoolExecutor(_NUM_DELETERS) as pool:
            for deletion, is_gone in zip(some, pool.map(deleter.delete, some), strict=True):
                deleted += [deletion] * is_gone
                num_done += 1
                if on_progress:
                    on_progress(num_done, len(deletions))
    return deleted


def _leftovers(cache_uri: str, older_than_s: float, *, dry_run: bool) -> list[str]:
    return storage.delete_leftovers(cache_uri, max(older_than_s, _LONGEST_WRITE_S), dry_run)


def _deletions(usage: Usage) -> Iterable[Deletion]:
    for file, info in usage.files.items():
        if _folder(file) in _ORDER and (reason := _why_unneeded(usage, file)):
            yield Deletion(file, info.size_bytes, reason)


def _why_unneeded(usage: Usage, file: str) -> str:
    """Return the reason why a file is not needed, or "" for a file that must stay."""
    if file in usage.named or not usage.is_old(file):
        return ""
    folder, _, name = file.partition("/")
    if folder == MANIFESTS:
        return "superseded version"
    if folder in (KEYS, QUARANTINE):
        return UNNAMED
    if folder == DATA:
        record = record_of(file)
        if f"{LEDGER}/{record}" not in usage.files:
            return UNFINISHED
        return "all rows shadowed or dropped" if record in usage.merged and usage.is_old(f"{LEDGER}/{record}") else ""
    # Quarantine records always stay: they are few and small, and `repair` rebuilds a damaged quarantine table from them.
    data = f"{DATA}/{name.removeprefix(FEATURES_PREFIX)}"
    is_dead = name.startswith(FEATURES_PREFIX) and name in usage.merged and data not in usage.named
    return "all rows shadowed or dropped" if is_dead and usage.is_old(data) else ""


def _folder(file: str) -> str:
    return file.partition("/")[0]
