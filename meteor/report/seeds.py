"""Several seeds of a variant: their mean and their range."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from meteor.report.data import VariantResult


def by_variant(results: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """Return variant -> results, one per seed, in the given order."""
    groups: dict[str, list[VariantResult]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def merge_seeds(results: Sequence[VariantResult]) -> list[VariantResult]:
    """Merge the seeds of each variant into one result.

    Its scores are means over seeds, with the lowest and highest seed as the interval; everything else comes from the first
    evaluated seed. A variant with one seed keeps the interval that comes from its questions.
    """
    return [_merge(name, runs) for name, runs in by_variant(results).items()]


def _merge(name: str, runs: Sequence[VariantResult]) -> VariantResult:
    # An evaluated seed is preferred, so that a failed seed does not hide the others.
    first = next((run for run in runs if run.scores is not None), runs[0])
    scored = [run.scores for run in runs if run.scores is not None]
    if len(scored) < 2:
        return replace(first, name=name)
    sets = [set_name for set_name in scored[0] if all(set_name in scores for scores in scored)]
    merged = {set_name: _mean_table([scores[set_name] for scores in scored]) for set_name in sets}
    return replace(first, name=name, scores=merged)


def _mean_table(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    types = [name for name in tables[0].get("by_type", {}) if all(name in table["by_type"] for table in tables)]
    scores = [table["score"] for table in tables]
    if None in scores:
        return {**tables[0], "score": None, "interval": None}
    merged = {**tables[0], "score": mean(scores), "interval": [min(scores), max(scores)]}
    if "by_type" in merged:
        merged["by_type"] = {name: _mean_table([table["by_type"][name] for table in tables]) for name in types}
    return merged
