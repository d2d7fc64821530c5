"""Settings of a run: strict and frozen, read from YAML with `extends` and dotted overrides."""

from meteor.config.digest import mathematical_settings, settings_digest
from meteor.config.load import load_run, parse_overrides, resolve_paths
from meteor.config.settings import FinetuneSettings, RunSettings, StageSettings, StudySettings
from meteor.config.study import Variant, expand_study

__all__ = [
    "FinetuneSettings",
    "RunSettings",
    "StageSettings",
    "StudySettings",
    "Variant",
    "expand_study",
    "load_run",
    "mathematical_settings",
    "parse_overrides",
    "resolve_paths",
    "settings_digest",
]
