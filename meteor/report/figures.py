"""Charts: loss over steps, throughput, scores by type of question."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from meteor.formatting import format_number, format_share
from meteor.report.canvas import (
    INK,
    MANY_VARIANTS,
    TEXT_POINTS,
    WIDTH_INCHES,
    Drawing,
    Look,
    new_figure,
    plain_axes,
    to_drawing,
)
from meteor.report.data import VariantResult
from meteor.report.measures import column, final_loss, median_rate, smooth
from meteor.report.seeds import by_variant
from meteor.report.tables import metric_title
from meteor.runs.reading import StageRecord

_RATES = (("num_samples", "samples/s"), ("num_visual_tokens", "visual tokens/s"))


def loss_figure(stage: str, runs: Mapping[str, Sequence[StageRecord]], looks: Mapping[str, Look]) -> Drawing:
    """Draw the loss of one stage over steps, all variants overlaid, and the learning rate below.

    A single seed is drawn twice, raw and thin, smoothed and thick. Several seeds are drawn smoothed and thin.

    Args:
        stage: name of the stage.
        runs: label of a curve -> records of the stage, one per seed.
        looks: label -> look.
    """
    figure = new_figure(WIDTH_INCHES, 5.2)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    for name, seeds in runs.items():
        for run in seeds:
            _draw_curve(loss_axes, rate_axes, run, looks[name], alone=len(seeds) == 1)
    loss_axes.set_ylabel("loss", fontsize=TEXT_POINTS)
    rate_axes.set_ylabel("lr", fontsize=TEXT_POINTS)
    rate_axes.set_xlabel("step", fontsize=TEXT_POINTS)
    for axes in (loss_axes, rate_axes):
        plain_axes(axes, grid="y")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate_axes.yaxis.get_offset_text().set_fontsize(TEXT_POINTS - 1)
    _add_legend(figure, list(runs), looks, lines=True)
    ends = {name: final_loss(seeds[0]) for name, seeds in runs.items()}
    described = ", ".join(f"{name} {format_number(loss)}" for name, loss in ends.items() if loss is not None)
    return to_drawing(
        figure,
        name=f"loss_{stage}",
        alt=f"Loss of stage {stage} over steps. At the last step: {described}.",
        caption="Thick: loss, smoothed over about a twentieth of the curve. Thin, behind it: loss of each step. A variant with "
        "several seeds has one smoothed line per seed. Below: learning rate.",
    )


def throughput_figure(runs: Mapping[str, Mapping[str, StageRecord]], looks: Mapping[str, Look]) -> Drawing:
    """Draw samples/s and visual tokens/s as bars, with a row of charts per stage.

    Args:
        runs: stage -> variant -> record of the stage.
        looks: variant -> look.
    """
    num_bars = max(len(stage_runs) for stage_runs in runs.values())
    figure = new_figure(WIDTH_INCHES, len(runs) * (1.0 + 0.3 * num_bars))
    grid = figure.subplots(len(runs), len(_RATES), squeeze=False)
    described = []
    for row, (stage, stage_runs) in zip(grid, runs.items(), strict=True):
        for axes, (key, label) in zip(row, _RATES, strict=True):
            rates = {name: median_rate(run.metrics, key) for name, run in stage_runs.items()}
            _draw_bars(axes, rates, looks, show_names=key == _RATES[0][0])
            axes.set_title(f"{stage}: {label}", fontsize=TEXT_POINTS, loc="left", color=INK, parse_math=False)
            values = ", ".join(f"{name} {format_number(rate)}" for name, rate in rates.items() if rate is not None)
            described.append(f"{stage}, {label}: {values or 'not recorded'}.")
    return to_drawing(
        figure,
        name="throughput",
        alt="Throughput by variant. " + " ".join(described),
        caption="Median over the reported steps.",
    )


def scores_figure(name: str, scores: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look]) -> Drawing:
    """Draw scores of all questions and of each type as a bar per variant, with 95 % intervals and the majority answer.

    Args:
        name: file stem.
        scores: variant -> table of `meteor.evaluation.score_table.score_table`.
        looks: variant -> look.
    """
    types = sorted({type_name for table in scores.values() for type_name in table["by_type"]})
    # Types of question times many variants would fill pages; the table has them.
    labels = ["all questions", *(types if len(types) > 1 and len(scores) <= MANY_VARIANTS else [])]
    bar_height = 0.8 / len(scores)
    metric = metric_title(next(iter(scores.values()))["metric"])
    figure = new_figure(WIDTH_INCHES, 1.1 + len(labels) * (0.22 * len(scores) + 0.2))
    axes = figure.subplots()
    for row, label in enumerate(labels):
        entries = {variant: table if row == 0 else table["by_type"].get(label) for variant, table in scores.items()}
        for position, (variant, entry) in enumerate(entries.items()):
            if entry is not None and entry["score"] is not None:
                y = row - 0.4 + bar_height * (position + 0.5)
                _draw_score(axes, entry, y, bar_height, looks[variant])
    axes.set_yticks(range(len(labels)), labels=labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{metric}, %", fontsize=TEXT_POINTS)
    plain_axes(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    _add_legend(figure, list(scores), looks, lines=False, extra=[_majority_line([], [])])
    values = ", ".join(
        f"{variant} {'not scored here' if table['score'] is None else format_share(table['score'])}"
        for variant, table in scores.items()
    )
    return to_drawing(
        figure,
        name=name,
        alt=f"{metric} by type of question. All questions: {values}.",
        caption="Whiskers: 95 % intervals, clustered by image. Dashed: score of a model that always gives the most frequent "
        "answer.",
    )


def _draw_curve(loss_axes: Axes, rate_axes: Axes, run: StageRecord, look: Look, *, alone: bool) -> None:
    steps, losses = column(run.metrics, "step"), column(run.metrics, "loss")
    smoothed = smooth(losses)
    if smoothed is not losses and alone:
        loss_axes.plot(steps, losses, color=look.colour, alpha=0.3, linewidth=0.8)
    marker = "o" if smoothed is losses else ""
    width = 2.0 if alone else 1.2
    loss_axes.plot(steps, smoothed, color=look.colour, linestyle=look.line_style, linewidth=width, marker=marker, ms=4)
    rate_axes.plot(steps, column(run.metrics, "lr"), color=look.colour, linestyle=look.line_style, linewidth=1.5)


def _draw_bars(axes: Axes, rates: Mapping[str, float | None], looks: Mapping[str, Look], *, show_names: bool) -> None:
    names = list(rates)
    for row, name in enumerate(names):
        rate, look = rates[name], looks[name]
        axes.barh(row, rate or 0, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        text = "not recorded" if rate is None else format_number(rate)
        axes.annotate(text, (rate or 0, row), (5, 0), textcoords="offset points", va="center", fontsize=TEXT_POINTS)
    axes.set_yticks(range(len(names)), labels=names if show_names else [], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    # The number of the longest bar needs space at its right.
    axes.set_xlim(0, 1.25 * max([rate or 0 for rate in rates.values()]) or 1)
    plain_axes(axes, grid=None)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.tick_params(axis="y", length=0)


def _draw_score(axes: Axes, entry: Mapping[str, Any], y: float, height: float, look: Look) -> None:
    share = 100 * entry["score"]
    axes.barh(y, share, height=0.9 * height, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
    if entry["interval"] is not None:
        axes.plot([100 * end for end in entry["interval"]], [y, y], color=INK, linewidth=1.4, marker="|", markersize=6)
    if entry["majority_score"] is not None:
        majority = 100 * entry["majority_score"]
        axes.add_line(_majority_line([majority, majority], [y - height / 2, y + height / 2]))


def _majority_line(x: Sequence[float], y: Sequence[float]) -> Line2D:
    # A white edge makes the line visible on dark bars.
    edge = [patheffects.withStroke(linewidth=3.4, foreground="white")]
    return Line2D(x, y, color="black", linestyle=(0, (2, 1)), linewidth=1.6, path_effects=edge, label="majority answer")


def _add_legend(
    figure: Figure, names: Sequence[str], looks: Mapping[str, Look], *, lines: bool, extra: Sequence[Line2D] = ()
) -> None:
    handles: list[Line2D | Patch] = []
    for name in names:
        look = looks[name]
        line = Line2D([], [], color=look.colour, linestyle=look.line_style, linewidth=2, label=name)
        handles.append(
            line
            if lines
            else Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0, label=name)
        )
    legend = figure.legend(
        handles=[*handles, *extra], loc="outside upper left", ncols=4, frameon=False, fontsize=TEXT_POINTS
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def comparable_runs(variants: Sequence[VariantResult], stage: str) -> dict[str, StageRecord]:
    """Return variant -> record of a stage, for variants that reported at least one step."""
    runs = {variant.name: variant.stages[stage] for variant in variants if stage in variant.stages}
    return {name: run for name, run in runs.items() if run.metrics}


def curves(variants: Sequence[VariantResult], stage: str) -> dict[str, list[StageRecord]]:
    """Return label -> records of a stage, one per seed; variants that share the stage share a curve with all their names."""
    names: dict[tuple[str, ...], list[str]] = {}
    runs: dict[tuple[str, ...], list[StageRecord]] = {}
    for name, seeds in by_variant(variants).items():
        records = [run.stages[stage] for run in seeds if stage in run.stages and run.stages[stage].metrics]
        if records:
            uris = tuple(record.uri for record in records)
            names.setdefault(uris, []).append(name)
            runs[uris] = records
    return {", ".join(names[uris]): records for uris, records in runs.items()}
