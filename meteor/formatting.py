"""Values as people read them: numbers with units and no more digits than mean something, settings by dotted name."""

import json
from collections.abc import Mapping
from typing import Any


def format_count(count: int) -> str:
    return f"{count:,}"


def format_number(value: float) -> str:
    """Three or more significant digits: 1,234 / 12.0 / 0.0123."""
    if abs(value) >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def format_parameters(count: int) -> str:
    """In millions from a million on, as the paper's Table 4 does."""
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else format_count(count)


def format_bytes(size_bytes: int) -> str:
    """Decimal units, as disks and object stores are sold."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        # From here on three digits would round up to 1e+03.
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"


def format_duration(seconds: float) -> str:
    """Two units at most: 0.42 s, 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def format_share(share: float) -> str:
    return f"{100 * share:.1f} %"


def format_interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"


def format_value(value: Any) -> str:
    """A setting's or record's value of any JSON type, on one line; a text is not quoted, null is "none"."""
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
    """``num_sub_images`` -> "sub images": a name the code uses, as a label."""
    return key.removeprefix("num_").replace("_", " ")
