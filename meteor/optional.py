"""The one way to import a package that may be absent: the error says what to install."""

import importlib
from types import ModuleType

from meteor.errors import MissingPackageError


def import_optional(module: str, *, needed_for: str, install: str) -> ModuleType:
    """Import ``module`` or say what it is needed for and how to install it.

    Raises:
        MissingPackageError: with the install line, and the import's own error as its cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which cannot be imported here ({error}). "
            f"Install it with: {install}"
        ) from error
