"""Checks of projector settings, all with the same kind of message."""

from collections.abc import Iterable
from typing import Any

from meteor.errors import SettingsError


def check_choice(setting: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise SettingsError unless ``value`` is one of ``choices``."""
    allowed = list(choices)
    if value not in allowed:
        raise SettingsError(f"{setting} is {value!r}; choose one of: {', '.join(map(str, allowed))}.")


def check_count(setting: str, value: Any) -> None:
    """Raise SettingsError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"{setting} is {value!r}; it must be an integer of at least 1.")


def check_fraction(setting: str, value: Any) -> None:
    """Raise SettingsError unless ``value`` is a number in [0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SettingsError(f"{setting} is {value!r}; it must be a number from 0 to 1.")
