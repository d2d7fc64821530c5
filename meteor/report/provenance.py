"""Provenance of a report's numbers: digests, versions, all settings; and a list of missing pieces."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.formatting import flatten, format_count, format_value, humanise
from meteor.report.data import VariantResult
from meteor.report.tables import Table
from meteor.runs.reading import StageRecord
from meteor.stages import STAGES

_STAGES = STAGES[1:]  # all but the feature cache, which variants share
_LABELS = {"digest": "run digest", "uri": "folder"}
_PROJECTOR_NOTES = {
    "focus": "FocusLLaVA-style, as its paper gives neither region sizes, nor scales, nor the form of the gate.",
    "llava_mini": "LLaVA-Mini's compressor alone, without the layers before it that fuse images into the text.",
    "meteor_37m": "has as many parameters as the paper's Table 4 says; the authors' layout may still differ.",
    "prumerge_plus": "neighbours are found by features, as keys of CLIP's attention are not cached.",
    "tokenpacker": "single-layer variant; the original takes keys and values from four blocks of CLIP.",
    "visionzip": "tokens are compared by features, as keys of CLIP's attention are not cached.",
}


@dataclass(frozen=True)
class Provenance:
    """Facts about the stages of all variants.

    Attributes:
        shared: facts that are equal for all stages.
        by_run: other facts, a row per stage.
        versions: versions of packages.
    """

    shared: Table
    by_run: Table
    versions: Table


@dataclass(frozen=True)
class SettingsBlock:
    """Resolved settings as JSON, below a title that names the stages with these settings."""

    title: str
    text: str


def provenance(variants: Sequence[VariantResult]) -> Provenance:
    """Lay out the facts in ``run.json`` of every stage of every variant."""
    runs = _runs(variants)
    facts = {title: _facts(run) for title, run in runs.items()}
    keys = list(dict.fromkeys(["digest", *(key for run_facts in facts.values() for key in run_facts)]))
    cells = {key: [run_facts.get(key, "none") for run_facts in facts.values()] for key in keys}
    # A single run shares nothing with another, and all its facts stay in one table.
    shared = [key for key in keys if len(runs) > 1 and len(set(cells[key])) == 1]
    differing = [key for key in keys if key not in shared]
    rows = zip(facts, *(cells[key] for key in differing), strict=True)
    return Provenance(
        shared=Table(("Fact", "Value"), tuple((_label(key), cells[key][0]) for key in shared), numeric=False),
        by_run=Table(("Run", *map(_label, differing)), tuple(rows), numeric=False),
        versions=_versions(list(runs.values())),
    )


def settings_blocks(variants: Sequence[VariantResult]) -> list[SettingsBlock]:
    """Return every distinct settings document once, below the names of the stages that used it."""
    titles: dict[str, list[str]] = {}
    for title, run in _runs(variants).items():
        text = json.dumps(run.settings, indent=2, sort_keys=True, ensure_ascii=False, default=str)
        titles.setdefault(text, []).append(title)
    return [SettingsBlock("; ".join(names), text) for text, names in titles.items()]


def projector_notes(variants: Sequence[VariantResult]) -> list[str]:
    """Return remarks about projectors that differ, or may differ, from the published ones."""
    names = {
        str(run.settings["projector"]["name"])
        for run in _runs(variants).values()
        if isinstance(run.settings.get("projector"), Mapping) and "name" in run.settings["projector"]
    }
    return [f"{name}: {_PROJECTOR_NOTES[name]}" for name in sorted(names & _PROJECTOR_NOTES.keys())]


def missing_pieces(variants: Sequence[VariantResult], cache: Mapping[str, Any] | None) -> list[str]:
    """Return a sentence per part of the report that a reader would expect and not find."""
    sentences = [] if cache is not None else ["No facts about the feature cache were given."]
    for variant in variants:
        for stage in _STAGES:
            run = variant.stages.get(stage)
            if run is None:
                sentences.append(f"{variant.name}: stage {stage} was not run.")
            elif not run.finished:
                reached = (
                    f"it had reached step {format_count(run.metrics[-1]['step'])}"
                    if run.metrics
                    else "it had reported no step"
                )
                sentences.append(f"{variant.name}: stage {stage} has not finished; {reached}.")
        if "evaluate" in variant.stages and variant.scores is None:
            sentences.append(f"{variant.name}: stage evaluate has written no scores.")
    return sentences


def _runs(variants: Sequence[VariantResult]) -> dict[str, StageRecord]:
    return {f"{v.name}, {stage}": v.stages[stage] for v in variants for stage in _STAGES if stage in v.stages}


def _facts(run: StageRecord) -> dict[str, str]:
    recorded = {key: value for key, value in run.recorded.items() if key not in ("versions", "variant", "name")}
    facts = flatten({"uri": run.uri, **recorded})
    return {key: format_value(value) for key, value in facts.items() if value not in (None, {})}


def _versions(runs: Sequence[StageRecord]) -> Table:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        versions: Mapping[str, Any] = run.recorded.get("versions", {})
        for package, version in versions.items():
            found.setdefault(package, {})[str(version)] = None
    return Table(
        ("Package", "Version"), tuple((package, ", ".join(found[package])) for package in sorted(found)), numeric=False
    )


def _label(key: str) -> str:
    return _LABELS.get(key, humanise(key).replace(".", " "))
