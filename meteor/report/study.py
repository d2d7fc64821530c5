"""Tables of a study: scores with differences from a control; and a run's numbers."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from meteor.formatting import format_share
from meteor.report.cost import training_cost
from meteor.report.data import RunResult, StudyTable
from meteor.report.measures import training_seconds
from meteor.report.paired import Difference, paired_difference
from meteor.report.seeds import by_variant
from meteor.report.tables import (
    NOT_RUN,
    Table,
    format_size,
    format_tokens,
    question_sets,
    score_title,
    shares_right,
)


def results_table(spec: StudyTable, runs: Sequence[RunResult]) -> Table:
    """Lay out size and scores of each variant, and its differences from the control on the same questions."""
    groups = by_variant(runs)
    sets = question_sets(runs)
    columns = ["Variant", "Tokens per image", "Projector"]
    columns += [
        column for name in sets for column in (score_title(runs, name), "Difference", "95 % interval", "By seed")
    ]
    rows = []
    for variant in _present(spec, groups):
        mine = groups[variant]
        cells = [variant, format_tokens(mine[0].num_visual_tokens_per_image), format_size(mine[0])]
        for name in sets:
            cells.append(_score(mine, name))
            if variant == spec.control:
                cells += ["control", "", ""]
            else:
                cells += _difference_cells(paired_difference(mine, groups.get(spec.control, []), name))
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows))


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
    found |= {f"encoder_flops/{stage}": flops for stage, flops in run.encoder_flops.items()}
    found |= {f"finetune_cost/{name}": value for name, value in training_cost(run).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _present(spec: StudyTable, groups: Mapping[str, Any]) -> list[str]:
    return [variant for variant in spec.variants if variant in groups]


def _score(runs: Sequence[RunResult], question_set: str) -> str:
    """Format the mean over seeds, with the lowest and the highest seed."""
    shares = shares_right(runs, question_set)
    if not shares:
        return NOT_RUN
    text = format_share(mean(shares))
    return f"{text} ({100 * min(shares):.1f} – {100 * max(shares):.1f})" if len(shares) > 1 else text


def _difference_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return [NOT_RUN, "", ""]
    interval = "one image" if difference.interval is None else " to ".join(map(_points, difference.interval))
    by_seed = "" if len(difference.by_seed) < 2 else ", ".join(map(_points, difference.by_seed.values()))
    return [_points(difference.mean) + (" *" if difference.is_clear else ""), interval, by_seed]


def _points(share: float) -> str:
    """Format percentage points with their sign, which is a true minus instead of a hyphen."""
    return f"{100 * share:+.1f}".replace("-", "−")
