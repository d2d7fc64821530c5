"""Checkpoints of a stage as a folder: which are complete, which is the best, which are damaged, and which go."""

from collections.abc import Iterator

from meteor import storage
from meteor.checkpoint.format import MANIFEST, Checkpoint
from meteor.checksums import read_checked_json, write_checked_json
from meteor.errors import CheckpointError

# Folder of the records of checkpoints that were found damaged.
_DAMAGED = "damaged"


def complete_checkpoints(root: str) -> list[str]:
    """List the URIs of complete checkpoints under ``root``, oldest first."""
    suffix = f"/{MANIFEST}"
    return sorted(info.uri.removesuffix(suffix) for info in storage.list_objects(root) if info.uri.endswith(suffix))


def best_checkpoint(root: str) -> str | None:
    """Return the complete checkpoint with the lowest held-out loss; None if none was measured."""
    losses = []
    for uri in complete_checkpoints(root):
        try:
            losses.append((Checkpoint(uri).state.get("held_out_loss"), uri))
        except CheckpointError:
            continue
    return min(((loss, uri) for loss, uri in losses if loss is not None), default=(None, None))[1]


def set_aside(uri: str, problem: str) -> None:
    """Take a damaged checkpoint out of the complete ones; its files stay until a newer checkpoint is complete.

    Args:
        uri: folder of the checkpoint.
        problem: text for `problems_of_damaged`.
    """
    root, _, step = uri.rpartition("/")
    write_checked_json(storage.join(root, _DAMAGED, f"{step}.json"), {"problem": problem})
    storage.delete(storage.join(uri, MANIFEST))


def problems_of_damaged(root: str) -> dict[str, str]:
    """Return URI of a record -> problem for all checkpoints under ``root`` that were ever set aside."""
    records = [info.uri for info in storage.list_objects(storage.join(root, _DAMAGED))]
    return {uri: read_checked_json(uri)["problem"] for uri in records}


def prune(root: str, *, keep: int) -> list[str]:
    """Delete old checkpoints: all but the newest ``keep`` complete checkpoints and the best.

    Incomplete checkpoints older than the newest complete one go too, as does everything that killed attempts left at these
    steps. A checkpoint's manifest is deleted first, so that a crash leaves an incomplete checkpoint, never a damaged one.

    Args:
        root: folder of the checkpoints, which the caller owns and into which nobody writes now.
        keep: number of newest complete checkpoints to keep.

    Returns:
        URIs of the deleted checkpoints.
    """
    root = storage.absolute(root)
    kept, best = complete_checkpoints(root)[-keep:], best_checkpoint(root)
    removed: list[str] = []
    for uri, files in _by_checkpoint(root):
        # An incomplete checkpoint newer than the newest complete one may still be in the making.
        if not kept or uri > kept[-1]:
            continue
        if uri not in (*kept, best):
            removed.append(uri)
        elif uri == kept[-1]:
            own = storage.join(uri, Checkpoint(uri).attempt, "")
            files = [file for file in files if not file.startswith(own) and not file.endswith(MANIFEST)]
        else:
            continue
        for file in sorted(files, key=lambda file: not file.endswith(MANIFEST)):
            storage.delete(file)
        storage.delete_leftovers(uri, older_than_s=0, dry_run=False)
        storage.delete_empty_folders(uri)
    return removed


def _by_checkpoint(root: str) -> Iterator[tuple[str, list[str]]]:
    files: dict[str, list[str]] = {}
    for info in storage.list_objects(root):
        step = info.uri.removeprefix(root).lstrip("/").partition("/")[0]
        if step != _DAMAGED:
            files.setdefault(storage.join(root, step), []).append(info.uri)
    yield from files.items()
