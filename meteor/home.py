"""Paths that begin with the user's home folder."""

import os

from meteor.errors import SettingsError


def expand_home(path: str) -> str:
    """Replace ``~`` at the start of a path by the home folder.

    Raises:
        SettingsError: the path begins with ``~``, and this user has no home folder, as in containers that run under a number.
    """
    expanded = os.path.expanduser(path)
    # Where Python finds no home it returns the path unchanged, and a folder named "~" would be made.
    if expanded.startswith("~"):
        raise SettingsError(
            f"{path!r} begins with a home folder, which is not known here: set HOME, or give a path that begins with /"
        )
    return expanded
