"""Elastic K: numbers of visual tokens per sub-image from which training draws one per step, without torch.

A model that was trained on several numbers answers with any of them. The number of tokens of a forward pass is an argument of
the projector, and follows from the slots of the prompt.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from meteor.errors import SettingsError

# Projector -> setting that decides about its number of tokens, and the setting's default. ``k`` is the number, ``grid`` the
# side of a square of tokens.
COUNT_SETTINGS = {
    "meteor": ("k", 144),
    "meteor_37m": ("k", 144),
    "visual_topk": ("k", 144),
    "resampler": ("k", 144),
    "avg_pool": ("grid", 12),
    "llava_mini": ("grid", 1),
}
# Each number of tokens has a layout of queries, which only training on that number teaches.
_LEARNS_EACH_COUNT = ("resampler", "llava_mini")
# Other settings that decide about numbers of tokens; a list or range is refused by name.
_FIXED_SETTINGS = ("k", "grid", "scale_factor", "dominant", "contextual", "max_tokens", "spaced")
_SCALE = 1 << 32


@dataclass(frozen=True)
class TokenCounts:
    """Numbers from which training draws, in the unit of the projector's setting.

    Attributes:
        values: ascending numbers; a single number if training draws nothing.
        weights: relative frequency of each number, whole numbers above 0.
    """

    values: tuple[int, ...]
    weights: tuple[int, ...]

    @classmethod
    def read(cls, setting: str, value: Any) -> "TokenCounts":
        """Read a number, a list of numbers, or a range ``{min: 16, max: 144}``.

        Numbers of a list are equally frequent. Those of a range are log-uniform: 16 to 32 comes as often as 32 to 64. Scores
        change with the logarithm of the number, and a uniform draw would spend seven eighths of its steps above 32.

        Raises:
            SettingsError: the value has another form, or a number is below 1.
        """
        if isinstance(value, Mapping):
            if (
                value.keys() != {"min", "max"}
                or not all(map(_is_count, value.values()))
                or value["min"] >= value["max"]
            ):
                raise SettingsError(
                    f"the projector's {setting} is {dict(value)!r}; give a range as {{min: 16, max: 144}}, two whole numbers "
                    "above 0, min below max"
                )
            values = tuple(range(value["min"], value["max"] + 1))
            # P(n) is proportional to 1 / n. Whole numbers are equal on every machine, logarithms may differ in the last bit.
            return cls(values, tuple(_SCALE // n for n in values))
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(map(_is_count, values)):
            raise SettingsError(f"the projector's {setting} is {value!r}; give whole numbers above 0")
        if isinstance(value, list | tuple) and (len(values) < 2 or list(values) != sorted(set(values))):
            raise SettingsError(
                f"the projector's {setting} is {list(values)!r}; list at least two numbers in ascending order, each once"
            )
        return cls(values, (1,) * len(values))

    @property
    def largest(self) -> int:
        return self.values[-1]

    @property
    def is_elastic(self) -> bool:
        """Whether training draws from several numbers."""
        return len(self.values) > 1

    def pick(self, number: int) -> int:
        """Map a random whole number of many bits to one of the values, each by its weight."""
        ends = list(accumulate(self.weights))
        return self.values[bisect_right(ends, number % ends[-1])]


def token_counts(projector: str, settings: Mapping[str, Any]) -> TokenCounts | None:
    """Return the numbers of visual tokens per sub-image of training; None if the projector has no such number.

    Raises:
        SettingsError: a setting has a wrong value, or the projector is trained with a single number of tokens.
    """
    check_counts(projector, settings)
    if projector not in COUNT_SETTINGS:
        return None
    setting, default = COUNT_SETTINGS[projector]
    counts = TokenCounts.read(setting, settings.get(setting, default))
    if setting == "grid":
        counts = TokenCounts(tuple(side**2 for side in counts.values), counts.weights)
    return counts


def with_count(projector: str, settings: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Return a projector's settings with ``k`` visual tokens per sub-image instead of the numbers of training.

    Raises:
        SettingsError: the projector cannot make this number of tokens.
    """
    if projector not in COUNT_SETTINGS:
        raise SettingsError(
            f"k={k}: projector {projector!r} has no k that may be chosen when answering; these have: "
            f"{', '.join(COUNT_SETTINGS)}"
        )
    setting, _ = COUNT_SETTINGS[projector]
    if not _is_count(k) or (setting == "grid" and math.isqrt(k) ** 2 != k):
        kind = "square number of tokens" if setting == "grid" else "whole number of tokens"
        raise SettingsError(f"k={k}: give projector {projector!r} a {kind} above 0")
    trained = token_counts(projector, settings)
    assert trained is not None
    if projector in _LEARNS_EACH_COUNT and k not in trained.values:
        raise SettingsError(
            f"k={k}: the queries of projector {projector!r} were trained for {_listed(trained)} tokens per sub-image: choose "
            f"one of these, or train with {k} too"
        )
    return {**settings, setting: math.isqrt(k) if setting == "grid" else k}


def check_counts(projector: str, settings: Mapping[str, Any]) -> None:
    """Refuse several numbers of tokens for a projector that is made for one.

    Raises:
        SettingsError: a setting is a list or range, and the projector needs a single number.
    """
    own = COUNT_SETTINGS.get(projector, ("",))[0]
    for name in _FIXED_SETTINGS:
        value = settings.get(name)
        if name != own and isinstance(value, list | tuple | Mapping):
            raise SettingsError(
                f"projector {projector!r} is trained with a single number of tokens, and {name} is {value!r}: give one number, "
                f"or choose one of: {', '.join(COUNT_SETTINGS)}"
            )
    if projector == "resampler" and isinstance(settings.get("k"), Mapping):
        raise SettingsError(
            f"the projector's k is {settings['k']!r}, and a range holds prime numbers, for which the resampler's grid of "
            "queries is a single row: list the numbers, for example [16, 36, 64, 144]"
        )


def side_of(k: int) -> int:
    """Return the side of a square of ``k`` tokens; raise ValueError if ``k`` is no square number."""
    side = math.isqrt(k)
    if side**2 != k:
        raise ValueError(f"k is {k}; this projector makes a square number of tokens")
    return side


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _listed(counts: TokenCounts) -> str:
    return ", ".join(map(str, counts.values))
