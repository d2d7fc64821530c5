"""Checks of projector settings and of tensor values, with uniform messages."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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


def check_positive(setting: str, value: Any) -> None:
    """Raise SettingsError unless ``value`` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise SettingsError(f"{setting} is {value!r}; it must be a finite number above 0.")


def require(condition: Tensor, message: str, details: Callable[[], str]) -> None:
    """Raise an error unless a condition on tensors holds; costs one read on the host, or none in a compiled graph.

    A compiled graph cannot raise a Python error without a graph break. While compiling, the assertion therefore becomes
    part of the graph (RuntimeError on the CPU, a device-side assertion on CUDA), and only the fixed message is known.

    Args:
        condition: tensor that must be true, 0-d bool.
        message: text of the error in a compiled graph.
        details: function that returns the eager error's text. It runs only if the check failed, and may read tensors.

    Raises:
        ValueError: the condition is false.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(details())
