"""Import of packages that may be absent, with an error that contains the install command."""

import importlib
from types import ModuleType

from meteor.errors import MissingPackageError


def import_optional(module: str, *, needed_for: str, install: str) -> ModuleType:
    """Import an optional module, or explain how to install its package.

    Args:
        module: dotted name of the module.
        needed_for: feature or setting that needs the module, for the error.
        install: install command, for the error.

    Raises:
        MissingPackageError: the module cannot be imported; the import's own error is the cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which cannot be imported here ({error}). "
            f"Install it with: {install}"
        ) from error
