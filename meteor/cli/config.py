"""`meteor config`: show, explain, validate and compare run files."""

import argparse
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from meteor.assembly.recipe import check_answer_counts
from meteor.command_line import add_run, read_run
from meteor.config import RunSettings, expand_study, load_run
from meteor.config.reference import settings_page
from meteor.formatting import flatten
from meteor.image.budget import visual_token_budget
from meteor.projector import build_projector


def add_commands(commands: Any) -> None:
    actions = commands.add_parser("config", help="show, explain, validate or compare run files").add_subparsers(
        required=True
    )
    show = actions.add_parser("show", help="print all settings of a run, defaults included, as YAML")
    add_run(show)
    show.set_defaults(command=_show)
    explain = actions.add_parser("explain", help="print every setting with its default and meaning")
    explain.add_argument("--markdown", action="store_true", help="print the reference page, docs/settings.md")
    explain.set_defaults(command=_explain)
    validate = actions.add_parser("validate", help="check a run file and its projector's settings")
    add_run(validate)
    validate.set_defaults(command=_validate)
    diff = actions.add_parser("diff", help="print the settings in which two run files differ")
    diff.add_argument("first", metavar="FILE")
    diff.add_argument("second", metavar="FILE")
    diff.set_defaults(command=_diff)


def _show(arguments: argparse.Namespace) -> int:
    print(yaml.safe_dump(read_run(arguments).model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(settings_page(), end="")
        return 0
    for line in explain(RunSettings):
        print(line)
    return 0


def explain(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return text about each setting: dotted name, default, meaning, and whether it changes no result."""
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += explain(field.annotation, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        mark = "  [changes no result]" if isinstance(extra, dict) and extra.get("operational") else ""
        default = "(required)" if field.is_required() else repr(field.default)
        lines.append(f"{prefix}{name} = {default}\n    {field.description}{mark}")
        # A section may be optional (Section | None), or there may be several by name (dict[str, Section]).
        for section in get_args(field.annotation):
            if isinstance(section, type) and issubclass(section, BaseModel):
                key = "<name>." if get_origin(field.annotation) is dict else ""
                lines += explain(section, f"{prefix}{name}.{key}")
    return lines


def _validate(arguments: argparse.Namespace) -> int:
    settings = read_run(arguments)
    variants = expand_study(settings) if settings.study else []
    for run in [settings, *(variant.settings for variant in variants)]:
        projector = run.projector
        build_projector(projector.name, vision_width=8, llm_width=8, **projector.settings)
        visual_token_budget(projector.name, projector.settings)
        check_answer_counts(run)
    study = f", {len(variants)} variants in its study" if variants else ""
    print(f"{arguments.run}: valid, run {settings.name!r}, projector {settings.projector.name!r}{study}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    first, second = (flatten(load_run(file).model_dump(mode="json")) for file in (arguments.first, arguments.second))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            print(f"{key}: {first.get(key)!r} -> {second.get(key)!r}")
    return 0
