"""Passwords, tokens and keys in texts: found, so that run files refuse them, and covered in all that is printed or sent."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

COVER = "***"
# A user with a password before a host; the password may contain slashes, as people forget to escape them, but a number
# between a colon and a slash is a port. Or anything before an @ that is part of a URI's host.
_USER = re.compile(r"(?<=://)(?:[^/@\s'\"]*:(?!\d+(?:[/?#]|$))[^@\s'\"]*|[^/@?#\s'\"]+)(?=@)")
_WORDS = r"password|passwd|pwd|secret|api[-_]?key|access[-_]?key|auth[-_]?token|access[-_]?token|credentials?"
# Arguments of addresses; the last ones sign an address of S3, Google's storage or Azure's for everybody who has it.
_ARGUMENT = re.compile(
    rf"(?<=[?&;])(?P<name>(?:[\w.-]*(?:{_WORDS})|token|sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token)|"
    r"awsaccesskeyid))=(?P<value>[^&;\s'\"]+)",
    re.IGNORECASE,
)
# Forms by which services mark their keys.
_KEY = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|gh[opsu]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|xox[abp]-[\w-]{10,})\b"
)
_BEARER = re.compile(r"(?<=\b[Bb]earer )(?=[\w.~+/=-]*\d)[\w.~+/=-]{16,}")
# A "pad_token" is no secret.
_NAME = re.compile(
    rf"(?:^|[._-])(?:{_WORDS}|(?:hf|hub|bearer|session|refresh)[-_]?token)$|(?:^|\.)token$", re.IGNORECASE
)


def redact(text: str) -> str:
    """Return a text in which passwords, tokens and keys are covered."""
    text = _ARGUMENT.sub(rf"\g<name>={COVER}", _USER.sub(COVER, text))
    return _BEARER.sub(COVER, _KEY.sub(COVER, text))


def find_secrets(values: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of a tree's texts that contain a secret, or whose name says so.

    Args:
        values: mappings, lists, texts and other JSON values.
        name: dotted name of ``values``.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            inner = f"{name}.{key}".lstrip(".")
            # A key may be an address: files are named with their weights.
            if redact(str(key)) != str(key):
                yield redact(inner)
            else:
                yield from find_secrets(value, inner)
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from find_secrets(value, f"{name}[{number}]")
    elif isinstance(values, str) and values and (redact(values) != values or _NAME.search(name)):
        yield name
