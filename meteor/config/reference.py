"""The reference page of all settings, generated from their definitions: ``docs/settings.md``."""

import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from meteor.config.settings import RunSettings

_HEAD = """\
# Settings

This page is for people who write run files. It lists every setting with its default and its meaning.

`meteor config explain --markdown > docs/settings.md` writes this page from `meteor/config/settings.py`.
`meteor config explain` prints the same list in a terminal.

- A run file is YAML: `pretrain.lr` below is `pretrain: {lr: 1e-3}` in the file.
- The command line takes the dotted form: `pretrain.lr=5e-4`.
- `extends: other.yaml` starts from another run file.
- An unknown setting is refused, and the message lists the known ones.
- **Digest** is `yes` if another value makes another run, with a folder and an MLflow run of its own. `no` marks settings that
  only say where something is or how fast it works. Data files count by their content, not by their path.
"""
_BOUNDS = {
    annotated_types.Ge: ("at least", "ge"),
    annotated_types.Gt: ("more than", "gt"),
    annotated_types.Le: ("at most", "le"),
    annotated_types.Lt: ("less than", "lt"),
}


def settings_page() -> str:
    """Render the reference page as Markdown, one table per section of a run file."""
    return "\n".join([_HEAD, *_section("the run", "", RunSettings)])


def _section(title: str, prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield a heading, a table of the plain fields, then the sections below."""
    fields = {name: field for name, field in model.model_fields.items() if not _is_section(field)}
    yield f"## {title[0].upper() + title[1:] if not prefix else f'`{title}`'}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    yield "| Setting | Default | Digest | Meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        yield f"| `{prefix}{name}` | {_default(field)} | {_in_digest(field)} | {_meaning(field)} |"
    yield ""
    for name, field in model.model_fields.items():
        for section in _sections_in(field.annotation):
            key = "<name>" if _origin_without_none(field.annotation) is dict else ""
            dotted = ".".join(part for part in (f"{prefix}{name}", key) if part)
            yield from _section(dotted, f"{dotted}.", section)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Find the settings classes in an annotation: plain, optional, or the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections_in(part)]


def _origin_without_none(annotation: Any) -> Any:
    """Return the generic type of an annotation, None aside: ``dict`` for ``dict[str, X] | None``."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_origin(annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    text = field.default if isinstance(field.default, str) else json.dumps(field.default)
    return f"`{text}`"


def _in_digest(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return "no" if isinstance(extra, dict) and extra.get("operational") else "yes"


def _meaning(field: FieldInfo) -> str:
    """Join the description, the allowed values and the bounds into table text."""
    parts = [_escape(field.description or "").strip(" .")]
    if parts[0].split(" ")[0].rstrip(",:").isalpha():  # not `torch.compile`
        parts[0] = parts[0][:1].upper() + parts[0][1:]
    if choices := _choices(field.annotation):
        parts.append("One of " + ", ".join(f"`{choice}`" for choice in choices))
    bounds = [f"{word} {getattr(bound, name)}" for bound in field.metadata for word, name in _bound(bound)]
    if bounds:
        text = " and ".join(bounds)
        parts.append(text[:1].upper() + text[1:])
    return ". ".join(parts) + "."


def _bound(bound: Any) -> Iterator[tuple[str, str]]:
    if type(bound) in _BOUNDS:
        yield _BOUNDS[type(bound)]


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a ``Literal`` with several of them, optional or not."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal and len(get_args(part)) > 1:
            return get_args(part)
    return ()


def _escape(text: str) -> str:
    """Keep the signs that Markdown and HTML would read as their own, outside code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)
