"""The report's tables: what each variant costs and scores, how it trained, where its settings differ."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meteor.formatting import (
    flatten,
    format_bytes,
    format_count,
    format_duration,
    format_interval,
    format_number,
    format_parameters,
    format_share,
    format_value,
    humanise,
)
from meteor.report.canvas import MANY_VARIANTS
from meteor.report.data import VariantResult
from meteor.report.measures import final_loss, median_rate, step_seconds, total, training_seconds
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES

NOT_RUN = "not run"
NOT_SCORED = "not scored here"
NOT_FINISHED = "not finished"
NOT_RECORDED = "not recorded"
NOT_SET = "not set"
GAPS = (NOT_RUN, NOT_FINISHED, NOT_RECORDED, NOT_SET)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row.

    Attributes:
        numeric: whether the other columns are aligned to the right.
        theirs: how many rows at the top are not ours but the paper's.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    theirs: int = 0


def headline_table(variants: Sequence[VariantResult]) -> Table:
    """One row a variant: cost in tokens, parameters and time beside the score."""
    sets = question_sets(variants)
    score_columns = [score_title(variants, name) for name in sets] or ["Score"]
    columns = (
        "Variant",
        "Visual tokens per image",
        "Projector parameters",
        *score_columns,
        "Training time",
        "Samples/s",
    )
    rows = []
    for variant in variants:
        rows.append(
            (
                variant.name,
                format_tokens(variant.num_visual_tokens_per_image),
                format_size(variant),
                *(_score_cell(variant, name) for name in sets or [""]),
                format_training_time(variant),
                _rate_cell(variant.stages.get("finetune"), "num_samples"),
            )
        )
    return Table(columns, tuple(rows))


def stage_table(variants: Sequence[VariantResult], stage: str) -> Table:
    """How one training stage went for each variant."""
    columns = (
        "Variant",
        "Steps",
        "Samples",
        "Last loss",
        "Time",
        "Samples/s",
        "Visual tokens/s",
        "Text tokens/s",
    )
    rows = []
    for variant in variants:
        run = variant.stages.get(stage)
        if run is None:
            rows.append((variant.name, *[NOT_RUN] * (len(columns) - 1)))
            continue
        loss, num_samples = final_loss(run), total(run.metrics, "num_samples")
        rows.append(
            (
                variant.name,
                format_count(run.metrics[-1]["step"]) if run.metrics else NOT_RECORDED,
                NOT_RECORDED if num_samples is None else format_count(num_samples),
                NOT_RECORDED if loss is None else f"{loss:#.4g}",
                _stage_time(run),
                _rate_cell(run, "num_samples"),
                _rate_cell(run, "num_visual_tokens"),
                _rate_cell(run, "num_text_tokens"),
            )
        )
    return Table(columns, tuple(rows))


def score_table(variants: Sequence[VariantResult], question_set: str) -> Table:
    """Scores with their 95 % intervals, all questions first, then each type, then the metric's further numbers."""
    tables = {variant.name: (variant.scores or {}).get(question_set) for variant in variants}
    types = sorted({name for table in tables.values() if table is not None for name in table["by_type"]})
    rows = []
    for label in ["all questions", *types]:
        entries = {name: _entry(table, label, types) for name, table in tables.items()}
        scored = [entry for entry in entries.values() if entry is not None]
        rows.append(
            (
                label,
                _distinct(format_count(entry["num_questions"]) for entry in scored),
                _distinct(_share_text(entry["majority_score"]) for entry in scored),
                *(NOT_RUN if entry is None else _score_text(entry) for entry in entries.values()),
            )
        )
    for extra in dict.fromkeys(key for table in tables.values() if table for key in table.get("extra", {})):
        cells = [NOT_RUN if table is None else _extra_text(extra, table) for table in tables.values()]
        rows.append((f"all questions: {extra.replace('_', ' ')}", "", "", *cells))
    table = Table(("Type", "Questions", "Majority answer", *tables), tuple(rows))
    return _transpose(table) if len(variants) > MANY_VARIANTS else table


def difference_table(variants: Sequence[VariantResult]) -> Table | None:
    """Settings in which variants differ; None if there are none. The run's name and what its report shows do not count."""
    values = _settings_by_stage(variants)
    names = tuple(variant.name for variant in variants)
    rows = []
    keys = {key for stages in values.values() for flat in stages.values() for key in flat}
    for key in sorted(key for key in keys if key != "name" and not key.startswith("report.")):
        for label, cells in _setting_rows(key, values):
            if len({cell for cell in cells if cell != NOT_RUN}) > 1:
                rows.append((label, *cells))
    if not rows:
        return None
    table = Table(("Setting", *names), tuple(rows), numeric=False)
    # Many variants that differ in few settings read better down than across.
    return _transpose(table) if len(variants) > max(4, len(rows)) else table


def cache_table(cache: Mapping[str, Any]) -> Table:
    """Facts about the feature cache; ``quarantine_reasons`` {reason: count} becomes one row a reason."""
    rows: list[tuple[str, str]] = []
    for key, value in cache.items():
        if isinstance(value, Mapping):
            rows.extend((f"{humanise(key)}: {name}", _fact(name, count)) for name, count in value.items())
        else:
            rows.append((humanise(key.removesuffix("_bytes")), _fact(key, value)))
    return Table(("Fact", "Value"), tuple(rows), numeric=False)


def format_training_time(variant: VariantResult) -> str:
    """Both training stages together; says so if only one finished."""
    seconds = training_seconds(variant)
    if not seconds:
        return NOT_FINISHED if any(stage in variant.stages for stage in TRAINING_STAGES) else NOT_RUN
    text = format_duration(sum(seconds.values()))
    return text if len(seconds) == len(TRAINING_STAGES) else f"{text} ({', '.join(seconds)} only)"


def format_tokens(num_visual_tokens_per_image: float | None) -> str:
    return (
        NOT_RECORDED
        if num_visual_tokens_per_image is None
        else f"{num_visual_tokens_per_image:,.1f}".removesuffix(".0")
    )


def format_size(variant: VariantResult) -> str:
    """Of the projector."""
    count = variant.num_projector_parameters
    return NOT_RECORDED if count is None else format_parameters(count)


def shares_right(runs: Sequence[VariantResult], question_set: str) -> list[float]:
    """The score of each run that was asked the set, where it can be scored here."""
    tables = [run.scores[question_set] for run in runs if run.scores and question_set in run.scores]
    return [table["score"] for table in tables if table["score"] is not None]


_METRICS = {
    "anls": "ANLS",
    "f1": "F1",
    "judge": "Judge's score",
    "mmmu_accuracy": "Accuracy",
    "vqa_accuracy": "VQA accuracy",
}


def metric_title(metric: str) -> str:
    """``VQA accuracy`` of ``vqa_accuracy``."""
    return _METRICS.get(metric, metric.replace("_", " ").capitalize())


def score_title(variants: Sequence[VariantResult], question_set: str) -> str:
    """``VQA accuracy, textvqa``; without the set's name where there is one set."""
    found = next((run.scores[question_set] for run in variants if run.scores and question_set in run.scores), {})
    title = metric_title(str(found.get("metric", "score")))
    return f"{title}, {question_set}" if len(question_sets(variants)) > 1 else title


def score_facts(table: Mapping[str, Any]) -> str:
    """What a set's scores depend on, in a sentence: evaluations that do not match differ in one of these."""
    facts = [
        table.get("title") or "LLaVA's format",
        f"split {table['split']}" if table.get("split") else "",
        f"{metric_title(table['metric'])}, version {table['metric_version']}",
        "OCR tokens in the prompt" if table.get("ocr") else "",
        f"images resized to {table['long_side']} pixels" if table.get("long_side") else "",
        table.get("note", ""),
    ]
    return "; ".join(filter(None, facts)) + "."


def question_sets(variants: Sequence[VariantResult]) -> list[str]:
    return list(dict.fromkeys(name for variant in variants for name in variant.scores or {}))


def _settings_by_stage(variants: Sequence[VariantResult]) -> dict[str, dict[str, dict[str, Any]]]:
    """Variant -> stage -> flat settings; those of a run that variants share are one variant's, and left out."""
    return {
        variant.name: {
            stage: {key: value for key, value in flatten(run.settings).items() if value != {}}
            for stage, run in variant.stages.items()
            if not run.settings.get("tracking", {}).get("used_by")
        }
        for variant in variants
    }


def _setting_rows(key: str, values: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(label, one cell a variant) of one setting; one row a stage if a variant ran its stages with different values."""
    cells = {
        name: {stage: format_value(flat.get(key, NOT_SET)) for stage, flat in stages.items()}
        for name, stages in values.items()
    }
    if all(len(set(by_stage.values())) <= 1 for by_stage in cells.values()):
        yield key, tuple(next(iter(by_stage.values()), NOT_RUN) for by_stage in cells.values())
        return
    for stage in dict.fromkeys(stage for by_stage in cells.values() for stage in by_stage):
        yield f"{key} ({stage})", tuple(by_stage.get(stage, NOT_RUN) for by_stage in cells.values())


def _fact(key: str, value: Any) -> str:
    if key.endswith("bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return format_count(value)
    return format_value(value)


def _transpose(table: Table) -> Table:
    turned = list(zip(table.columns, *table.rows, strict=True))
    return Table(("Variant", *turned[0][1:]), tuple(turned[1:]), table.numeric)


def _score_cell(variant: VariantResult, question_set: str) -> str:
    entry = (variant.scores or {}).get(question_set)
    return NOT_RUN if entry is None else _score_text(entry)


def _score_text(entry: Mapping[str, Any]) -> str:
    if entry["score"] is None:
        return NOT_SCORED
    interval = "" if entry["interval"] is None else f" ({format_interval(*entry['interval'])})"
    return f"{format_share(entry['score'])}{interval}"


def _share_text(share: float | None) -> str:
    return "" if share is None else format_share(share)


def _extra_text(extra: str, table: Mapping[str, Any]) -> str:
    value = table["extra"].get(extra)
    return "" if value is None else format_count(value) if extra.startswith("num_") else format_share(value)


def _entry(table: Mapping[str, Any] | None, label: str, types: Sequence[str]) -> Mapping[str, Any] | None:
    if table is None:
        return None
    return table["by_type"].get(label) if label in types else table


def _distinct(texts: Iterable[str]) -> str:
    """One text if all are equal, else all of them: variants may have been asked different numbers of questions."""
    return " / ".join(dict.fromkeys(texts))


def _stage_time(run: StageRecord) -> str:
    seconds = step_seconds(run)
    if not run.finished:
        return NOT_FINISHED
    return NOT_RECORDED if seconds is None else format_duration(seconds)


def _rate_cell(run: StageRecord | None, count_key: str) -> str:
    if run is None:
        return NOT_RUN
    rate = median_rate(run.metrics, count_key)
    return NOT_RECORDED if rate is None else format_number(rate)
