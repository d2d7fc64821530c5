"""Plan and report of a clean-up, as values and as text."""

from dataclasses import asdict, dataclass
from typing import Any

from meteor.cache.upkeep.compaction import Compaction
from meteor.formatting import format_bytes

# Reasons for files that a writer may own which has not finished yet.
UNFINISHED = "its writer never finished it"
UNNAMED = "no kept version names it"


@dataclass(frozen=True)
class Deletion:
    """A file below the cache's URI that is not needed, and the reason."""

    file: str
    size_bytes: int
    reason: str


@dataclass(frozen=True)
class GcPlan:
    """Work that `run_gc` would do.

    Attributes:
        cache_uri: URI of the cache.
        older_than_s: least age of a file to delete.
        now_s: time of the plan in epoch seconds, by the store's clock.
        latest: the latest version.
        kept_versions: (version, reason) of each version that is kept.
        deletions: files to delete, in the order of their deletion.
        compactions: data files whose live rows move to a new file; a later run deletes the old file.
        leftovers: URIs of unfinished writes and empty folders.
        num_files, num_bytes: number and size of all files below the cache's URI.
    """

    cache_uri: str
    older_than_s: float
    now_s: float
    latest: int
    kept_versions: tuple[tuple[int, str], ...]
    deletions: tuple[Deletion, ...]
    compactions: tuple[Compaction, ...]
    leftovers: tuple[str, ...]
    num_files: int
    num_bytes: int

    @property
    def deleted_bytes(self) -> int:
        """Bytes that the deletions free."""
        return sum(deletion.size_bytes for deletion in self.deletions)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.deletions or self.compactions or self.leftovers)

    def by_reason(self) -> dict[str, tuple[int, int]]:
        """Return number and bytes of the files to delete, by folder and reason."""
        found: dict[str, tuple[int, int]] = {}
        for deletion in self.deletions:
            name = f"{deletion.file.partition('/')[0]}: {deletion.reason}"
            num_files, num_bytes = found.get(name, (0, 0))
            found[name] = (num_files + 1, num_bytes + deletion.size_bytes)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {"deleted_bytes": self.deleted_bytes, **asdict(self)}

    def to_text(self) -> str:
        """Return the plan as lines for people."""
        lines = [f"{self.cache_uri}: {self.num_files:,} files, {format_bytes(self.num_bytes)}"]
        lines += [f"  keep version {version}: {reason}" for version, reason in self.kept_versions]
        lines += [
            f"  delete {num_files:,} in {name}, {format_bytes(num_bytes)}"
            for name, (num_files, num_bytes) in self.by_reason().items()
        ]
        if self.compactions:
            lines.append(
                f"  compact {len(self.compactions):,} data files, which frees "
                f"{format_bytes(sum(compaction.dead_bytes for compaction in self.compactions))}"
            )
        if self.leftovers:
            lines.append(f"  delete {len(self.leftovers):,} unfinished writes and empty folders")
        lines.append(f"  nothing younger than {self.older_than_s / 3600:g} hours is touched")
        if self.is_empty:
            lines.append("  nothing to do")
        return "\n".join(lines)


@dataclass(frozen=True)
class GcReport:
    """Work that `run_gc` has done.

    Attributes:
        num_deleted, deleted_bytes: number and size of the deleted files.
        num_compacted: data files whose live rows were moved.
        num_leftovers: unfinished writes and empty folders that were deleted.
        version: the latest version; a new version if rows were moved.
        notes: parts of the plan that were not carried out, with reasons.
    """

    num_deleted: int
    deleted_bytes: int
    num_compacted: int
    num_leftovers: int
    version: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as lines for people."""
        done = f"deleted {self.num_deleted:,} files, {format_bytes(self.deleted_bytes)}"
        done += f", and {self.num_leftovers:,} unfinished writes and empty folders" if self.num_leftovers else ""
        if self.num_compacted:
            done += (
                f"; compacted {self.num_compacted:,} data files in version {self.version}, a later gc deletes the old"
            )
        return "\n".join([done, *self.notes])
