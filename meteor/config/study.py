"""Expansion of a study: named changes, a grid of values and seeds become runs of their own."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from meteor.config.load import change_settings, explain_problems
from meteor.config.settings import RunSettings
from meteor.errors import SettingsError
from meteor.formatting import shorten

# Letters of the list of variants in an error.
_MAX_NAMES = 200


@dataclass(frozen=True)
class Variant:
    """A variant of a study with one of the study's seeds.

    Attributes:
        name: name of the variant, shared by all its seeds.
        seed: seed of both training stages; None if the study names no seeds and the run's own seeds hold.
        changes: dotted setting -> value, for each setting that differs from the study's run.
        settings: the whole run, called ``name`` or, if the study has several seeds, ``name.s<seed>``.
    """

    name: str
    seed: int | None
    changes: Mapping[str, Any]
    settings: RunSettings


def expand_study(run: RunSettings) -> list[Variant]:
    """List every variant of a run's study with every seed, in the order of the run file.

    Every named variant is combined with every point of the grid. A study with neither has one variant, the run itself.

    Raises:
        SettingsError: the run has no study, a changed setting does not exist or has a wrong value, two variants get one
            name, or the study has tables and a variant has no question sets.
    """
    study = run.study
    if study is None:
        raise SettingsError(f"run {run.name!r} has no study: give its variants under `study:` (meteor config explain)")
    base = run.model_dump(mode="json", exclude={"study"})
    base["tracking"]["study"] = run.name
    variants = []
    for (name, changes), point in itertools.product((study.variants or {"": {}}).items(), _points(study.grid)):
        full_name = "_".join(filter(None, [name, *(f"{_last(key)}-{_word(value)}" for key, value in point.items())]))
        for seed in study.seeds or [None]:
            variants.append(_variant(run.name, base, full_name or run.name, seed, {**changes, **point}, study.seeds))
    names = [variant.settings.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"two variants of the study are called {twice[0]!r}: give them different names")
    unscored = list(dict.fromkeys(variant.name for variant in variants if not variant.settings.data.evaluate))
    if study.tables and unscored:
        raise SettingsError(
            f"study {run.name!r} has tables of scores, and no question sets for {shorten(', '.join(unscored), _MAX_NAMES)}: "
            "name question sets in data.evaluate, as jobs/runs/meteor_7b.yaml does, or leave out study.tables"
        )
    return variants


def _points(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value)).strip("-")


def _variant(
    study: str, base: dict[str, Any], name: str, seed: int | None, changes: Mapping[str, Any], seeds: tuple[int, ...]
) -> Variant:
    content = {**base, "name": name if len(seeds) < 2 else f"{name}.s{seed}"}
    seeded = {} if seed is None else {"pretrain.seed": seed, "finetune.seed": seed}
    try:
        settings = RunSettings.model_validate(change_settings(content, {**seeded, **changes}))
    except ValidationError as error:
        raise SettingsError(f"study {study}, variant {name}: {explain_problems(error)}") from error
    return Variant(name, seed, dict(changes), settings)
