"""Several seeds of one variant: means, and how far they lie apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from meteor.report.data import VariantResult


def by_variant(results: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """Variant -> its runs, one a seed, in the order given."""
    groups: dict[str, list[VariantResult]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def merge_seeds(results: Sequence[VariantResult]) -> list[VariantResult]:
    """One result a variant: scores are means, with the lowest and highest seed for their interval.

    All else is the first seed's. A variant of one seed stays as it is, with the interval that its questions give it.
    """
    return [_merge(name, runs) for name, runs in by_variant(results).items()]


def _merge(name: str, runs: Sequence[VariantResult]) -> VariantResult:
    # One that has been evaluated, where there is one: a seed that failed does not hide the others.
    first = next((run for run in runs if run.scores is not None), runs[0])
    scored = [run.scores for run in runs if run.scores is not None]
    if len(scored) < 2:
        return replace(first, name=name)
    sets = [one for one in scored[0] if all(one in scores for scores in scored)]
    return replace(first, name=name, scores={one: _mean_table([scores[one] for scores in scored]) for one in sets})


def _mean_table(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    types = [name for name in tables[0].get("by_type", {}) if all(name in table["by_type"] for table in tables)]
    scores = [table["score"] for table in tables]
    if None in scores:
        return {**tables[0], "score": None, "interval": None}
    merged = {**tables[0], "score": mean(scores), "interval": [min(scores), max(scores)]}
    if "by_type" in merged:
        merged["by_type"] = {name: _mean_table([table["by_type"][name] for table in tables]) for name in types}
    return merged
