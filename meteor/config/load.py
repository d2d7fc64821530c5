"""Loading of `RunSettings` from a YAML file and dotted overrides."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meteor.config.settings import QuestionSetSettings, RunSettings
from meteor.config.yaml_text import read_yaml
from meteor.errors import SettingsError
from meteor.home import expand_home


def load_run(path: str, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file, follow its ``extends``, apply overrides, validate.

    Args:
        path: YAML file, or the bare name of a file under jobs/runs/.
        overrides: changes of the form ``a.b=value``; the value is read as YAML (``finetune.lr=2e-5``,
            ``projector.settings={k: 64}``).

    Raises:
        SettingsError: the file is missing or malformed, a key is unknown, or a type is wrong.
    """
    merged = _read(_find(path), ())
    for keys, value in parse_overrides(overrides):
        merged = _replace(merged, keys, value)
    try:
        return RunSettings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain_problems(error)}") from error


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Split overrides into keys and values: ``["a.b=1"]`` -> ``[(["a", "b"], 1)]``.

    Raises:
        SettingsError: an override is not of the form ``a.b=value``, or its value is not valid YAML.
    """
    result = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(keys := dotted.split(".")):
            raise SettingsError(f"override {override!r} is not of the form a.b=value")
        result.append((keys, read_yaml(text, override)))
    return result


def change_settings(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those in ``changes`` replaced, by dotted name.

    The projector's name is replaced first, because a new name empties ``projector.settings``.
    """
    for dotted, value in sorted(changes.items(), key=lambda change: change[0] not in ("projector", "projector.name")):
        settings = _replace(settings, dotted.split("."), value)
    return settings


def _replace(settings: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Return the settings with ``value`` at ``keys``. Mappings are replaced as a whole: ``data.evaluate={}`` empties it."""
    if len(keys) == 1:
        change = {keys[0]: value}
    else:
        inner = settings.get(keys[0])
        change = {keys[0]: _replace(inner if isinstance(inner, dict) else {}, keys[1:], value)}
    if keys[0] == "projector" and _name(change) != _name(settings) and keys != ["projector"]:
        # The settings of the former projector are arguments that the new one may not have.
        change["projector"].pop("settings", None)
    return settings | change


def _find(path: str) -> Path:
    candidates = [Path(path), Path("jobs/runs") / f"{path}.yaml"]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise SettingsError(f"there is no run file {path!r} (looked for {', '.join(map(str, candidates))})")


def _read(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    # Absolute paths, so that a circle is found however `extends` spells the names.
    file = file.resolve()
    if file in seen:
        raise SettingsError(f"run files extend each other in a circle: {' -> '.join(str(f) for f in (*seen, file))}")
    try:
        content = read_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8 text ({error}): save it in that encoding") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must hold a mapping of settings, not {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise SettingsError(f"{file}: extends must be the name of a run file, and is {parent!r}")
    if not os.path.isfile(file.parent / parent):
        raise SettingsError(f"{file} extends {parent!r}, and there is no such file in {file.parent}")
    return _merge(_read(file.parent / parent, (*seen, file)), content)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings key by key; ``over`` wins. Another projector's name drops the former `projector.settings`."""
    merged = dict(base)
    for key, value in over.items():
        if key == "projector" and isinstance(value, dict) and value.get("name", _name(base)) != _name(base):
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _name(settings: dict[str, Any]) -> Any:
    projector = settings.get("projector")
    return projector.get("name") if isinstance(projector, dict) else None


def explain_problems(error: ValidationError) -> str:
    """Describe pydantic's findings on one line; an unknown setting is answered with the known ones."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting {where} = {problem['input']!r}{_suggest(problem['loc'])}")
        else:
            lines.append(
                f"{where} = {problem['input']!r}: {problem['msg']}"
                if problem["loc"]
                else problem["msg"].removeprefix("Value error, ")
            )
    return "; ".join(lines)


def _suggest(location: tuple[int | str, ...]) -> str:
    """List the settings that exist beside an unknown one."""
    model: Any = RunSettings
    for part in location[:-1]:
        # Optional parts (`LoraSettings | None`) are unions without fields, so they get no suggestion.
        field = model.model_fields.get(str(part)) if hasattr(model, "model_fields") else None
        if field is None:
            return ""
        model = field.annotation
    return f" (known here: {', '.join(sorted(model.model_fields))})" if hasattr(model, "model_fields") else ""


def resolve_paths(settings: RunSettings) -> RunSettings:
    """Make every local path absolute, because Ray's workers run in working directories of their own."""
    data = settings.data
    update = {
        "output": _absolute(settings.output),
        "data": data.model_copy(
            update={
                "roots": {prefix: _absolute(root) for prefix, root in data.roots.items()},
                "pretrain": _absolute_sources(data.pretrain),
                "finetune": _absolute_sources(data.finetune),
                "held_out": {stage: _absolute_file(uri) for stage, uri in data.held_out.items()},
                "evaluate": {name: _absolute_questions(questions) for name, questions in data.evaluate.items()},
            }
        ),
        "cache": settings.cache.model_copy(update={"uri": settings.cache.uri and _absolute(settings.cache.uri)}),
        "vision": settings.vision.model_copy(update={"path": _model_path(settings.vision.path)}),
        "llm": settings.llm.model_copy(update={"path": _model_path(settings.llm.path)}),
        "finetune": settings.finetune.model_copy(
            update={"pretrained": settings.finetune.pretrained and _absolute(settings.finetune.pretrained)}
        ),
        "evaluate": settings.evaluate.model_copy(
            update={"model": settings.evaluate.model and _absolute(settings.evaluate.model)}
        ),
    }
    return settings.model_copy(update=update)


def _absolute_sources(named: str | dict[str, float] | None) -> str | dict[str, float] | None:
    if isinstance(named, dict):
        return {_absolute_file(uri): weight for uri, weight in named.items()}
    return named and _absolute_file(named)


def _absolute_file(uri: str) -> str:
    # The hub's cache keeps files as links to others without an ending, which tells the form.
    return uri if "://" in uri else os.path.abspath(expand_home(uri))


def _absolute_questions(questions: QuestionSetSettings) -> QuestionSetSettings:
    verdicts = questions.verdicts and _absolute(questions.verdicts)
    return questions.model_copy(update={"path": _absolute(questions.path), "verdicts": verdicts})


def _model_path(path: str) -> str:
    """Make a local directory absolute; leave a hub id as it is."""
    return _absolute(path) if os.path.isdir(expand_home(path)) else path


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(expand_home(uri)).resolve())
