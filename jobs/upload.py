"""Size of the working directory that a job's submission uploads, measured before, because a cluster refuses large ones late."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from meteor.errors import SettingsError
from meteor.formatting import format_bytes

# Ray's dashboard takes no larger request (DASHBOARD_CLIENT_MAX_SIZE), and files are uploaded without compression.
_MAX_BYTES = 100 << 20
# Ray leaves these out by itself.
_NEVER_UPLOADED = {".git", ".venv", "venv", "__pycache__"}
_NUM_SHOWN = 3


def require_small(folder: Path) -> None:
    """Refuse a working directory that is too large to be uploaded.

    Raises:
        SettingsError: the files that no ``.gitignore`` or ``.rayignore`` excludes have more than 100 MiB.
    """
    sizes: Counter[str] = Counter()
    for file in _uploaded(folder.absolute(), []):
        sizes[_place(file.relative_to(folder.absolute()))] += file.stat().st_size
    total_bytes = sum(sizes.values())
    if total_bytes <= _MAX_BYTES:
        return
    largest = ", ".join(f"{place} ({format_bytes(size)})" for place, size in sizes.most_common(_NUM_SHOWN))
    raise SettingsError(
        f"the working directory {folder.absolute()} has {format_bytes(total_bytes)}, and a cluster takes at most "
        f"{format_bytes(_MAX_BYTES)} with a job. The largest parts are {largest}: move data and outputs elsewhere, or name "
        "them in .rayignore, a file like .gitignore beside it"
    )


def _place(file: Path) -> str:
    """Return the folder of a file, at most two levels deep, or the file itself if it is in no folder."""
    return "/".join(file.parts[: min(2, len(file.parts) - 1) or 1]) + ("/" if len(file.parts) > 1 else "")


def _uploaded(folder: Path, ignored: Sequence[Callable[[Path], bool]]) -> Iterator[Path]:
    """Yield the files that Ray uploads, by its own reading of the ignore files."""
    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=True)]
    for path in folder.iterdir():
        if path.name in _NEVER_UPLOADED or any(is_ignored(path) for is_ignored in ignored):
            continue
        if path.is_dir():
            yield from _uploaded(path, ignored)
        elif path.is_file():
            yield path
