"""Names and addresses as MLflow accepts them and as messages may show them."""

import hashlib
import re

from meteor.secrets import COVER, redact

MAX_NAME_LENGTH = 250


def public_uri(uri: str) -> str:
    """Remove user and password from a URI, for messages and files."""
    return redact(uri).replace(f"{COVER}@", "")


def mlflow_name(name: str) -> str:
    """Return a metric's, parameter's or tag's name as MLflow accepts it; different names stay different.

    Letters that MLflow refuses become ":<hexadecimal code>:". Codes also stand for dots at the start or after a slash, a
    slash at an end or after another slash, and a colon that would look like such a code. A name that is too long ends in
    a digest.
    """
    escaped = re.sub(r"[^A-Za-z0-9_\-. /:]|:(?=[0-9a-f]+:)", lambda match: f":{ord(match[0]):x}:", name)
    escaped = re.sub(r"(?<![^/])\.+", lambda match: ":2e:" * len(match[0]), escaped)
    escaped = re.sub(r"^/|/$|(?<=/)/", ":2f:", escaped)
    if 0 < len(escaped) <= MAX_NAME_LENGTH:
        return escaped
    return f"{escaped[: MAX_NAME_LENGTH - 18]}::{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:16]}"
