"""Separation of the settings that change the mathematics from the operational ones, and a digest."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def mathematical_settings(settings: BaseModel) -> dict[str, Any]:
    """Return the settings without the operational ones (no paths, worker counts, logging), as JSON values."""
    values, result = settings.model_dump(mode="json"), {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(settings, name)
        result[name] = mathematical_settings(value) if isinstance(value, BaseModel) else values[name]
    return result


def settings_digest(content: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``content``: independent of key order, machine and process."""
    # NaN is refused, because it is no JSON and differs from itself.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
