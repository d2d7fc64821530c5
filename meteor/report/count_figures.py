"""Figure of scores against visual tokens per sub-image: one model with several numbers, and a model for each number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from meteor.image.elastic import COUNT_SETTINGS, TokenCounts, token_counts
from meteor.report.canvas import (
    INK,
    TEXT_POINTS,
    WIDTH_INCHES,
    Drawing,
    new_figure,
    plain_axes,
    to_drawing,
    variant_looks,
)
from meteor.report.data import RunResult
from meteor.report.tables import question_sets

# Distance between the whiskers of two lines at one number of tokens, as a factor on the logarithmic axis.
_STEP = 1.02
_MANY_COUNTS = 6


@dataclass(frozen=True)
class Answered:
    """A variant's number of tokens.

    Attributes:
        name: name of the variant.
        model: URI of the stage-2 folder whose model answered.
        projector: name of the projector.
        trained: numbers of tokens of training.
        k: number of tokens when answering.
        rest: settings of training without seeds and the number of tokens, as text.
        scores: the variant's score table of the question set.
    """

    name: str
    model: str
    projector: str
    trained: TokenCounts
    k: int
    rest: str
    scores: Mapping[str, Any]


# Label -> points from few tokens to many.
Lines = dict[str, list[Answered]]


def count_figure(variants: Sequence[RunResult]) -> Drawing | None:
    """Draw score against visual tokens per sub-image, with a chart per question set.

    Variants with one trained model and different ``evaluate.k`` form a line. Variants that were each trained and answered
    with one number, and differ in nothing else, form another.

    Args:
        variants: results with merged seeds.

    Returns:
        The figure; None if no model answered with several numbers of tokens.
    """
    charts = {name: lines for name in question_sets(variants) if (lines := find_lines(variants, name))}
    if not charts:
        return None
    looks = variant_looks(list(dict.fromkeys(label for lines in charts.values() for label in lines)))
    figure = new_figure(WIDTH_INCHES, 3.8 * len(charts))
    all_axes = figure.subplots(len(charts), 1, squeeze=False).flat
    for axes, (name, lines) in zip(all_axes, charts.items(), strict=True):
        for place, (label, points) in enumerate(lines.items()):
            _draw_line(axes, label, points, looks[label].colour, shift=_STEP ** (place - (len(lines) - 1) / 2))
        ticks = sorted({point.k for points in lines.values() for point in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(name, fontsize=TEXT_POINTS, loc="left", color=INK, parse_math=False)
        axes.set_xlabel("visual tokens per sub-image", fontsize=TEXT_POINTS)
        axes.set_ylabel("score, %", fontsize=TEXT_POINTS)
        axes.legend(fontsize=TEXT_POINTS - 1, frameon=False)
        plain_axes(axes, grid="y")
    described = "; ".join(_described(name, lines) for name, lines in charts.items())
    return to_drawing(
        figure,
        name="token_counts",
        alt=f"Score against visual tokens per sub-image. {described}.",
        caption="A line of one model joins its answers with different numbers of tokens. Whiskers are the range of the seeds, "
        "or with one seed the 95 % interval of its questions.",
    )


def find_lines(variants: Sequence[RunResult], question_set: str) -> Lines:
    """Return the lines of a question set; empty if no model answered with several numbers of tokens."""
    answered = list(_answered(variants, question_set))
    by_model: dict[str, list[Answered]] = {}
    by_rest: dict[str, list[Answered]] = {}
    for point in answered:
        by_model.setdefault(point.model, []).append(point)
        if not point.trained.is_elastic and point.k == point.trained.largest:
            by_rest.setdefault(point.rest, []).append(point)
    lines: Lines = {}
    for points in filter(_has_several, by_model.values()):
        lines[_unique(f"one {points[0].projector} model, trained with {_counts(points[0].trained)}", lines)] = _by_k(
            points
        )
    if lines:
        for points in filter(_has_several, by_rest.values()):
            label = f"a {points[0].projector} model for each number of tokens"
            lines[_unique(label, lines)] = _by_k(points)
    return lines


def _answered(variants: Sequence[RunResult], question_set: str) -> Iterator[Answered]:
    """Yield the variants whose projector has a number of tokens, and that have a score."""
    for variant in variants:
        table = (variant.scores or {}).get(question_set)
        finetune = variant.stages.get("finetune")
        if not table or table["score"] is None or finetune is None or "evaluate" not in variant.stages:
            continue
        projector = finetune.settings.get("projector") or {"name": "", "settings": {}}
        trained = token_counts(projector["name"], projector["settings"])
        if trained is None:
            continue
        k = variant.answered_k(question_set) or trained.largest
        yield Answered(variant.name, finetune.uri, projector["name"], trained, k, _rest(finetune.settings), table)


def _rest(settings: Mapping[str, Any]) -> str:
    """Return the settings of training without seeds and without the number of tokens, as JSON."""
    projector = settings["projector"]
    own, _ = COUNT_SETTINGS[projector["name"]]
    other = {name: value for name, value in projector["settings"].items() if name != own}
    parts = {name: settings.get(name) for name in ("slicing", "vision", "llm")}
    stages = {name: {**(settings.get(name) or {}), "seed": None} for name in ("pretrain", "finetune")}
    return json.dumps([projector["name"], other, parts, stages], sort_keys=True)


def _has_several(points: Sequence[Answered]) -> bool:
    return len({point.k for point in points}) > 1


def _by_k(points: Sequence[Answered]) -> list[Answered]:
    """Return one point per number of tokens, from few to many."""
    return [next(point for point in points if point.k == k) for k in sorted({point.k for point in points})]


def _counts(trained: TokenCounts) -> str:
    values = trained.values
    if len(values) > _MANY_COUNTS:
        return f"{values[0]:,} to {values[-1]:,}"
    return ", ".join(map(str, values))


def _unique(label: str, lines: Lines) -> str:
    """Return the label, with a number if another line has it."""
    number = sum(other == label or other.startswith(f"{label} (") for other in lines)
    return f"{label} ({number + 1})" if number else label


def _draw_line(axes: Axes, label: str, points: Sequence[Answered], colour: str, *, shift: float) -> None:
    at = [point.k * shift for point in points]
    axes.plot(at, [100 * point.scores["score"] for point in points], "o-", color=colour, linewidth=1.6, label=label)
    for place, point in zip(at, points, strict=True):
        if point.scores.get("interval") is not None:
            axes.plot([place, place], [100 * end for end in point.scores["interval"]], color=colour, linewidth=1.0)


def _described(name: str, lines: Lines) -> str:
    scores = (
        f"{label}: " + ", ".join(f"{100 * point.scores['score']:.1f} at {point.k}" for point in points)
        for label, points in lines.items()
    )
    return f"{name}: {'; '.join(scores)}"
