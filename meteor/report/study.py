"""A study's own tables: scores with differences from a control, and what each variant costs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from meteor.formatting import format_bytes, format_number, format_share
from meteor.report.data import StudyTable, VariantResult
from meteor.report.measures import training_seconds
from meteor.report.paired import Difference, paired_difference
from meteor.report.seeds import by_variant
from meteor.report.tables import (
    NOT_RECORDED,
    NOT_RUN,
    Table,
    format_size,
    format_tokens,
    format_training_time,
    question_sets,
    score_title,
    shares_right,
)


def results_table(spec: StudyTable, runs: Sequence[VariantResult]) -> Table:
    """Cost and scores of each variant, and how it differs from the control on the same questions."""
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


def cost_table(runs: Sequence[VariantResult]) -> Table:
    """What each variant takes to train and to answer, measured on the same hardware with the same questions."""
    columns = (
        *("Variant", "Projector parameters", "Tokens per image", "Training time", "Training tokens/s"),
        *("Prompt tokens", "Prompt's pass", "Answer tokens/s", "Memory answering", "Encoder's share avoided"),
    )
    rows = []
    for variant, seeds in by_variant(runs).items():
        one = next((run for run in seeds if run.efficiency), seeds[0])
        measured = one.efficiency
        answers = [NOT_RECORDED] * 4
        if measured:
            answers = [
                f"{measured['num_prompt_tokens']:,.0f}",
                f"{1000 * measured['prefill_s']:.3g} ms",
                f"{measured['tokens_per_s']:.3g}",
                format_bytes(measured["memory_bytes"]),
            ]
        shares = ", ".join(f"{stage} {format_share(share)}" for stage, share in one.encoder_shares.items())
        rows.append(
            (
                variant,
                format_size(one),
                format_tokens(one.num_visual_tokens_per_image),
                format_training_time(one),
                _training_rate(one),
                *answers,
                shares or NOT_RECORDED,
            )
        )
    return Table(columns, tuple(rows))


def numbers(run: VariantResult) -> dict[str, float]:
    """One run's results by name, for MLflow and for spreadsheets; those that are there."""
    seconds = training_seconds(run)
    found: dict[str, float | None] = {
        "projector_parameters": run.num_projector_parameters,
        "visual_tokens_per_image": run.num_visual_tokens_per_image,
        "training_seconds": sum(seconds.values()) if seconds else None,
    }
    found |= {f"{name}/{table['metric']}": table["score"] for name, table in (run.scores or {}).items()}
    found |= {
        f"answers/{name}": value for name, value in (run.efficiency or {}).items() if isinstance(value, int | float)
    }
    found |= {f"encoder_share/{stage}": share for stage, share in run.encoder_shares.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _present(spec: StudyTable, groups: Mapping[str, Any]) -> list[str]:
    return [variant for variant in spec.variants if variant in groups]


def _score(runs: Sequence[VariantResult], question_set: str) -> str:
    """The mean over seeds, and the lowest and highest."""
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
    """Percentage points with their sign; a minus, not a hyphen."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _training_rate(run: VariantResult) -> str:
    stage = run.stages.get("finetune")
    seconds = training_seconds(run).get("finetune")
    if stage is None or not seconds:
        return NOT_RUN if stage is None else NOT_RECORDED
    tokens = sum(row.get("num_visual_tokens", 0) + row.get("num_text_tokens", 0) for row in stage.metrics)
    return format_number(tokens / seconds)
