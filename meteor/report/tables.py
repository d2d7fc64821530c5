"""Tables of a report: cost and scores of each variant, its training, and differences in settings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
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
from meteor.report.data import RunResult
from meteor.report.measures import final_loss, median_rate, step_seconds, total, training_seconds
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES

NOT_RUN = "not run"
NOT_SCORED = "not scored here"
FOR_JUDGE = "for the judge"
FOR_SERVER = "for the server"
OTHER_QUESTIONS = "other questions"
NOT_FINISHED = "not finished"
NOT_RECORDED = "not recorded"
NOT_SET = "not set"
GAPS = (NOT_RUN, NOT_SCORED, FOR_JUDGE, FOR_SERVER, OTHER_QUESTIONS, NOT_FINISHED, NOT_RECORDED, NOT_SET)

# A table with more scores in a row is wider than a page.
_MANY_SETS = 5
# Superscript letters of footnotes; Unicode has no superscript q that fonts share.
MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: names of the columns; the first column names the row.
        rows: cells of each row.
        numeric: whether the columns after the first are aligned to the right.
        theirs: number of rows at the top that come from the paper.
        footnotes: texts below the table; each begins with the superscript letter that marks its cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    theirs: int = 0
    footnotes: tuple[str, ...] = ()


def headline_table(variants: Sequence[RunResult]) -> Table:
    """Lay out cost in tokens, parameters and time, and scores: a row per variant, or a column if there are many sets."""
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
    table = Table(columns, tuple(rows))
    return _transpose(table) if len(sets) > _MANY_SETS and len(variants) < len(columns) else table


def stage_table(variants: Sequence[RunResult], stage: str) -> Table:
    """Lay out steps, loss, time and rates of a training stage, with a row per variant."""
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


def score_table(variants: Sequence[RunResult], question_set: str) -> Table:
    """Lay out scores with 95 % intervals: all questions, each type of question, and more numbers of the metric."""
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
                *(_score_text(entry, tables[name]) for name, entry in entries.items()),
            )
        )
    for extra in dict.fromkeys(key for table in tables.values() if table for key in table.get("extra", {})):
        cells = [NOT_RUN if table is None else _extra_text(extra, table) for table in tables.values()]
        rows.append((f"all questions: {extra.replace('_', ' ')}", "", "", *cells))
    table = Table(("Type", "Questions", "Majority answer", *tables), tuple(rows))
    return _transpose(table) if len(variants) > MANY_VARIANTS else table


def difference_table(variants: Sequence[RunResult]) -> Table | None:
    """Lay out the settings in which variants differ, without the run's name and the report's settings; None if none do."""
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
    # Many variants that differ in few settings are easier to read in rows than in columns.
    return _transpose(table) if len(variants) > max(4, len(rows)) else table


def cache_table(cache: Mapping[str, Any]) -> Table:
    """Lay out facts about the feature cache; ``quarantine_reasons`` {reason: count} becomes a row per reason."""
    rows: list[tuple[str, str]] = []
    for key, value in cache.items():
        if isinstance(value, Mapping):
            rows.extend((f"{humanise(key)}: {name}", _fact(name, count)) for name, count in value.items())
        else:
            rows.append((humanise(key.removesuffix("_bytes")), _fact(key, value)))
    return Table(("Fact", "Value"), tuple(rows), numeric=False)


def format_training_time(variant: RunResult) -> str:
    """Format the time of both training stages together; the text says so if only one has finished."""
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


def format_size(variant: RunResult) -> str:
    """Format the number of parameters of the projector."""
    count = variant.num_projector_parameters
    return NOT_RECORDED if count is None else format_parameters(count)


def why_unscored(table: Mapping[str, Any]) -> str:
    """Return why a set that was answered has no score: a judge or a server scores it, or the right answers are not known."""
    by = table.get("scored_by") or ("judge" if table["metric"] == "judge" else "")
    return {"judge": FOR_JUDGE, "server": FOR_SERVER}.get(by, NOT_SCORED)


def why_no_score(runs: Sequence[RunResult], question_set: str) -> str:
    """Return why runs have no score on a question set: they did not answer it, or it is not scored here."""
    tables = [run.scores[question_set] for run in runs if run.scores and question_set in run.scores]
    return why_unscored(tables[0]) if tables else NOT_RUN


def shares_right(runs: Sequence[RunResult], question_set: str) -> list[float]:
    """Return the scores of the runs on a question set, 0 to 1, without runs that lack a score."""
    tables = [run.scores[question_set] for run in runs if run.scores and question_set in run.scores]
    return [table["score"] for table in tables if table["score"] is not None]


def mean_score(runs: Sequence[RunResult], question_set: str) -> str:
    """Format the mean score of the runs on a question set in percent, or why they have none."""
    shares = shares_right(runs, question_set)
    return f"{100 * mean(shares):.1f}" if shares else why_no_score(runs, question_set)


_METRICS = {
    "anls": "ANLS",
    "f1": "F1",
    "judge": "Judge's score",
    "mmmu_accuracy": "Accuracy",
    "vqa_accuracy": "VQA accuracy",
}


def metric_title(metric: str) -> str:
    """Return the title of a metric, for example "VQA accuracy" for ``vqa_accuracy``."""
    return _METRICS.get(metric, metric.replace("_", " ").capitalize())


def score_title(variants: Sequence[RunResult], question_set: str) -> str:
    """Return the title of a score, for example "VQA accuracy, textvqa"; a single set's name is omitted."""
    found = next((run.scores[question_set] for run in variants if run.scores and question_set in run.scores), {})
    title = metric_title(str(found.get("metric", "score")))
    return f"{title}, {question_set}" if len(question_sets(variants)) > 1 else title


def score_facts(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe everything that a set's scores depend on, to compare evaluations whose scores do not match.

    Args:
        tables: variant -> table of the set's scores.

    Returns:
        A sentence; or a sentence per way in which the variants were evaluated, with their names.
    """
    variants: dict[str, list[str]] = {}
    for name, table in tables.items():
        variants.setdefault(_facts_of(table), []).append(name)
    return list(variants) if len(variants) == 1 else [f"{', '.join(names)}: {text}" for text, names in variants.items()]


def _facts_of(table: Mapping[str, Any]) -> str:
    facts = [
        table.get("title") or "LLaVA's format",
        f"split {table['split']}" if table.get("split") else "",
        f"{metric_title(table['metric'])}, version {table['metric_version']}",
        "OCR tokens in the prompt" if table.get("ocr") else "",
        f"images resized to {table['long_side']:,} pixels" if table.get("long_side") else "",
        _preset_text(table),
        f"only the first {table['limit']:,} questions" if table.get("limit") else "",
        f"{_settings_text(table['selection'])} when answering" if table.get("selection") else "",
        table.get("note", ""),
    ]
    return "; ".join(filter(None, facts)) + "."


def _settings_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={format_value(value)}" for name, value in values.items())


def _preset_text(table: Mapping[str, Any]) -> str:
    """Name the evaluation preset of a set, with the settings in which the run departs from it."""
    if not table.get("preset"):
        return ""
    changes = {name: "original" if value is None else value for name, value in table.get("changes", {}).items()}
    return f"preset {table['preset']}" + (f" changed by {_settings_text(changes)}" if changes else "")


def question_sets(variants: Sequence[RunResult]) -> list[str]:
    return list(dict.fromkeys(name for variant in variants for name in variant.scores or {}))


def _settings_by_stage(variants: Sequence[RunResult]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return variant -> stage -> flat settings, without shared stages, whose settings are those of one variant."""
    return {
        variant.name: {
            stage: {key: value for key, value in flatten(_with_short_sets(run.settings)).items() if value != {}}
            for stage, run in variant.stages.items()
            if not run.settings.get("tracking", {}).get("used_by")
        }
        for variant in variants
    }


def _with_short_sets(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Describe each question set by one text: its format, and the options that are not the default."""
    data = settings.get("data") or {}
    sets = data.get("evaluate") or {}
    texts = {
        name: ", ".join(
            [
                str(options.get("format")),
                *(
                    f"{key}: {format_value(value)}"
                    for key, value in options.items()
                    if key not in ("format", "path", "verdicts")
                    and value is not None
                    and (key, value) != ("compat", True)
                ),
            ]
        )
        for name, options in sets.items()
    }
    return {**settings, "data": {**data, "evaluate": texts}} if sets else settings


def _setting_rows(key: str, values: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (label, cell per variant) of a setting, in a row per stage if a variant ran its stages with different values."""
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


def _score_cell(variant: RunResult, question_set: str) -> str:
    entry = (variant.scores or {}).get(question_set)
    return _score_text(entry, entry)


def _score_text(entry: Mapping[str, Any] | None, table: Mapping[str, Any] | None) -> str:
    """Format the score of a set's table or of a type of questions in it."""
    if entry is None or table is None:
        return NOT_RUN
    if entry["score"] is None:
        return why_unscored(table)
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
    """Join distinct texts: variants may have answered different numbers of questions."""
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
