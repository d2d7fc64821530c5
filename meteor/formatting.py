"""Formatting of values for people: numbers with units and significant digits, settings by dotted name."""

import json
from collections.abc import Mapping
from typing import Any


def format_count(count: int) -> str:
    """Format a whole number with thousands separators: 1,234."""
    return f"{count:,}"


def format_amount(amount: float, noun: str) -> str:
    """Format a number with its noun: 1 run, 2 runs, 0.5 GPUs."""
    return f"{amount:,g} {noun}{'' if amount == 1 else 's'}"


def shorten(text: str, most: int) -> str:
    """Cut a text to ``most`` characters, with "..." at its end if it was longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def format_number(value: float) -> str:
    """Format a number with three or more significant digits: 1,234 / 12.0 / 0.0123."""
    if abs(value) >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def format_parameters(count: int) -> str:
    """Format a number of parameters, in millions from one million, as the paper's Table 4 does."""
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else format_count(count)


def format_bytes(size_bytes: int) -> str:
    """Format bytes in decimal units, as disks and object stores are sold."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        # From 999.5 on, three significant digits would be printed as 1e+03.
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"


def format_duration(seconds: float) -> str:
    """Format a duration in at most two units: 0.42 s, 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def format_share(share: float) -> str:
    """Format a share in [0, 1] as percent: 12.3 %."""
    return f"{100 * share:.1f} %"


def format_interval(low: float, high: float) -> str:
    """Format an interval of shares in percent, without the unit: 12.3 – 45.6."""
    return f"{100 * low:.1f} – {100 * high:.1f}"


def format_value(value: Any) -> str:
    """Format a JSON value of any type on one line; text is not quoted, and null is "none"."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name, the form overrides are written in; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def humanise(key: str) -> str:
    """Turn a name from the code into a label: ``num_sub_images`` -> "sub images"."""
    return key.removeprefix("num_").replace("_", " ")


def format_flops(flops: float) -> str:
    """Format a number of FLOPs in the largest unit below it, for example ``3.21 GFLOP``."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if abs(flops) >= size:
            return f"{flops / size:,.3g} {unit}"
    return f"{flops:,.0f} FLOP"
