"""Tables of a study: scores with differences from a control; and a run's numbers."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from meteor.formatting import format_share
from meteor.report.cost import training_cost
from meteor.report.data import RunResult, StudyTable
from meteor.report.measures import training_seconds
from meteor.report.paired import Difference, paired_difference
from meteor.report.paper_columns import paper_numbers
from meteor.report.seeds import by_variant
from meteor.report.tables import (
    OTHER_QUESTIONS,
    Table,
    format_size,
    format_tokens,
    question_sets,
    score_title,
    shares_right,
    why_no_score,
)

_DIFFERENCE = ("Difference", "95 % interval", "By seed")
# A table with more sets in a row is wider than a page.
_MANY_SETS = 3


def results_table(spec: StudyTable, runs: Sequence[RunResult]) -> Table:
    """Lay out size and scores of each variant, and its differences from the control on the same questions.

    With many question sets each has rows of its own, without the sizes.
    """
    groups, sets = by_variant(runs), question_sets(runs)
    if len(sets) > _MANY_SETS:
        return _results_by_set(spec, runs)
    columns = ["Variant", "Tokens per image", "Projector"]
    columns += [column for name in sets for column in (score_title(runs, name), *_DIFFERENCE)]
    rows = []
    for variant in _present(spec, groups):
        mine = groups[variant]
        cells = [variant, format_tokens(mine[0].num_visual_tokens_per_image), format_size(mine[0])]
        for name in sets:
            cells += _result_cells(spec, groups, variant, name)
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows))


def _results_by_set(spec: StudyTable, runs: Sequence[RunResult]) -> Table:
    groups = by_variant(runs)
    rows = tuple(
        (score_title(runs, name), variant, *_result_cells(spec, groups, variant, name))
        for name in question_sets(runs)
        for variant in _present(spec, groups)
    )
    return Table(("Question set", "Variant", "Score", *_DIFFERENCE), rows)


def _result_cells(
    spec: StudyTable, groups: Mapping[str, Sequence[RunResult]], variant: str, question_set: str
) -> list[str]:
    """Return a variant's score on a question set, and the cells of its difference from the control."""
    mine, control = groups[variant], groups.get(spec.control, [])
    score = _score(mine, question_set)
    if variant == spec.control:
        return [score, "control", "", ""]
    difference = paired_difference(mine, control, question_set)
    if difference is None:
        return [score, _gap(mine, control, question_set), "", ""]
    return [score, *_difference_cells(difference)]


def numbers(run: RunResult) -> dict[str, float]:
    """Return name -> number of a run, for MLflow and for spreadsheets, without numbers that the run lacks."""
    seconds = training_seconds(run)
    found: dict[str, float | None] = {
        "projector_parameters": run.num_projector_parameters,
        "visual_tokens_per_image": run.num_visual_tokens_per_image,
        "training_seconds": sum(seconds.values()) if seconds else None,
        "encoding_seconds": run.encoding_s,
    }
    found |= {f"{name}/{table['metric']}": table["score"] for name, table in (run.scores or {}).items()}
    found |= {
        f"answers/{name}": value for name, value in (run.efficiency or {}).items() if isinstance(value, int | float)
    }
    found |= {f"encoder_share/{stage}": share for stage, share in run.encoder_shares.items()}
    found |= paper_numbers(run)
    found |= {f"encoder_flops/{stage}": flops for stage, flops in run.encoder_flops.items()}
    found |= {f"finetune_cost/{name}": value for name, value in training_cost(run).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _present(spec: StudyTable, groups: Mapping[str, Any]) -> list[str]:
    return [variant for variant in spec.variants if variant in groups]


def _score(runs: Sequence[RunResult], question_set: str) -> str:
    """Format the mean over seeds, with the lowest and the highest seed."""
    shares = shares_right(runs, question_set)
    if not shares:
        return why_no_score(runs, question_set)
    text = format_share(mean(shares))
    return f"{text} ({100 * min(shares):.1f} – {100 * max(shares):.1f})" if len(shares) > 1 else text


def _gap(runs: Sequence[RunResult], control: Sequence[RunResult], question_set: str) -> str:
    """Return why a variant has no difference from its control on a question set."""
    unscored = next((side for side in (runs, control) if not shares_right(side, question_set)), None)
    return OTHER_QUESTIONS if unscored is None else why_no_score(unscored, question_set)


def _difference_cells(difference: Difference) -> list[str]:
    interval = "one image" if difference.interval is None else " to ".join(map(_points, difference.interval))
    by_seed = "" if len(difference.by_seed) < 2 else ", ".join(map(_points, difference.by_seed.values()))
    return [_points(difference.mean) + (" *" if difference.is_clear else ""), interval, by_seed]


def _points(share: float) -> str:
    """Format percentage points with their sign, which is a true minus instead of a hyphen."""
    return f"{100 * share:+.1f}".replace("-", "−")
