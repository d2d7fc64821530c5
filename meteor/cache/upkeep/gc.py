"""Removing what no reader needs: superseded versions, shadowed rows, and what crashed writers left behind.

A plan says what would go and why; carrying it out looks at everything again and deletes what still nobody needs. Each
file goes after everything that names it, so that a reader never sees a version whose files are gone and a crash
in between leaves no more than work for the next run.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from meteor import storage
from meteor.cache.folder import DATA, KEYS, LEDGER, MANIFESTS, QUARANTINE, read_cache_info
from meteor.cache.ledger import FEATURES_PREFIX, record_of
from meteor.cache.manifest import manifest_uri
from meteor.cache.pins import pins
from meteor.cache.upkeep.compaction import compact, plan_compactions
from meteor.cache.upkeep.gc_plan import Deletion, GcPlan, GcReport
from meteor.cache.upkeep.usage import Usage, read_usage
from meteor.errors import CacheError, NotFoundError

DAY_S = 24 * 3600.0
_NUM_DELETERS = 16
# Each folder before those that its files name.
_ORDER = (MANIFESTS, KEYS, QUARANTINE, LEDGER, DATA)


def plan_gc(cache_uri: str, *, older_than_s: float = DAY_S, now_s: float | None = None) -> GcPlan:
    """Find what nobody needs. Nothing is changed.

    Kept are: the latest version, those that runs have pinned, those superseded less than ``older_than_s`` ago, and all
    that these name; data files that the next commit will merge; and whatever is younger than ``older_than_s``, which is
    the longest that a writer may take between a file and what makes it count, and a reader of an old version to finish.

    Args:
        cache_uri: the cache.
        older_than_s: see above.
        now_s: the time to count from; the store's clock when None.

    Raises:
        CacheError: there is no cache, or a version to be kept is damaged, so that nobody can tell what it needs.
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
        deletions=tuple(sorted(_deletions(usage), key=lambda one: (_ORDER.index(_folder(one.file)), one.file))),
        compactions=tuple(plan_compactions(usage)),
        leftovers=tuple(storage.delete_leftovers(cache_uri, older_than_s, True)),
        num_files=len(usage.files),
        num_bytes=sum(info.size_bytes for info in usage.files.values()),
    )


def run_gc(plan: GcPlan, *, on_progress: Callable[[int, int], None] | None = None) -> GcReport:
    """Do what the plan says, except where it has become wrong.

    Args:
        plan: of `plan_gc`.
        on_progress: called with the number of files deleted and to be deleted.

    Raises:
        CacheError: a run pinned a version while it was being deleted. It is there again, and nothing else is gone.
    """
    fresh = plan_gc(plan.cache_uri, older_than_s=plan.older_than_s, now_s=plan.now_s)
    still_unneeded = set(fresh.deletions)
    deletions = [deletion for deletion in plan.deletions if deletion in still_unneeded]
    by_folder = [[one.file for one in deletions if _folder(one.file) == folder] for folder in _ORDER]
    _delete_versions(plan.cache_uri, by_folder[0])
    num_done = len(by_folder[0])
    for files in by_folder[1:]:
        with ThreadPoolExecutor(_NUM_DELETERS) as pool:
            for _ in pool.map(lambda file: storage.delete(storage.join(plan.cache_uri, file)), files):
                num_done += 1
                if on_progress:
                    on_progress(num_done, len(deletions))
    leftovers = storage.delete_leftovers(plan.cache_uri, plan.older_than_s, False)
    to_compact = {one.file for one in fresh.compactions}
    version, num_compacted, notes = compact(
        plan.cache_uri, [one.file for one in plan.compactions if one.file in to_compact]
    )
    if num_kept := len(plan.deletions) - len(deletions):
        notes = [f"{num_kept} files that the plan named were kept: they are needed by now", *notes]
    return GcReport(
        num_deleted=len(deletions),
        deleted_bytes=sum(deletion.size_bytes for deletion in deletions),
        num_compacted=num_compacted,
        num_leftovers=len(leftovers),
        version=version,
        notes=tuple(notes),
    )


def _deletions(usage: Usage) -> Iterable[Deletion]:
    for file, info in usage.files.items():
        if _folder(file) in _ORDER and (reason := _why_unneeded(usage, file)):
            yield Deletion(file, info.size_bytes, reason)


def _why_unneeded(usage: Usage, file: str) -> str:
    """Empty for a file that must stay."""
    if file in usage.named or not usage.is_old(file):
        return ""
    folder, _, name = file.partition("/")
    if folder == MANIFESTS:
        return "superseded version"
    if folder in (KEYS, QUARANTINE):
        return "no kept version names it"
    if folder == DATA:
        record = record_of(file)
        if f"{LEDGER}/{record}" not in usage.files:
            return "its writer never finished it"
        return "all rows shadowed or dropped" if record in usage.merged and usage.is_old(f"{LEDGER}/{record}") else ""
    # Quarantine records are few and small, and what a damaged quarantine table is made from again.
    data = f"{DATA}/{name.removeprefix(FEATURES_PREFIX)}"
    is_dead = name.startswith(FEATURES_PREFIX) and name in usage.merged and data not in usage.named
    return "all rows shadowed or dropped" if is_dead and usage.is_old(data) else ""


def _delete_versions(cache_uri: str, files: list[str]) -> None:
    """Delete manifests. `FeatureCache.pin` writes first and looks after that, as we do: one of the two sees the other."""
    contents: dict[str, bytes] = {}
    for uri in (storage.join(cache_uri, file) for file in files):
        # Another gc may be faster.
        with suppress(NotFoundError):
            contents[uri] = storage.read_bytes(uri)
        storage.delete(uri)
    for pin in pins(cache_uri) if files else ():
        uri = manifest_uri(cache_uri, pin["manifest_version"])
        if uri in contents:
            storage.write_bytes(uri, contents[uri])
            raise CacheError(
                f"{cache_uri}: run {pin['run_digest']} pinned version {pin['manifest_version']} while it was being "
                "deleted; it is there again, and nothing it needs is gone. Run gc again"
            )


def _folder(file: str) -> str:
    return file.partition("/")[0]
