"""Figures of a study: scores against visual tokens, and the patches of an image that each variant keeps."""

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes

from meteor.report.canvas import INK, TEXT_POINTS, WIDTH_INCHES, Drawing, Look, new_figure, plain_axes, to_drawing
from meteor.report.data import SelectionPanel, SubImageScores, VariantResult
from meteor.report.seeds import by_variant
from meteor.report.selection_figures import bare_axes, dim, image_pixels, kept_mask
from meteor.report.tables import question_sets, shares_right

_FIELDS = (("visual_scores", "visual"), ("native_scores", "native"), ("combined_scores", "combined"))
_LABEL_POINTS = TEXT_POINTS - 1


def pareto_figure(runs: Sequence[VariantResult], looks: Mapping[str, Look]) -> Drawing | None:
    """Draw score against visual tokens per image, with a chart per question set; None if no variant has both numbers.

    A line joins the variants that no variant with at most as many tokens beats.
    """
    points = {name: found for name in question_sets(runs) if (found := _points(runs, name))}
    if not points:
        return None
    figure = new_figure(WIDTH_INCHES, 4.2 * len(points))
    all_axes = figure.subplots(len(points), 1, squeeze=False).flat
    for axes, (name, found) in zip(all_axes, points.items(), strict=True):
        _draw_points(axes, found, looks)
        axes.set_title(name, fontsize=TEXT_POINTS, loc="left", color=INK, parse_math=False)
    best = {name: [variant for variant, *_ in frontier(found)] for name, found in points.items()}
    described = "; ".join(f"{name}: {', '.join(variants)}" for name, variants in best.items())
    return to_drawing(
        figure,
        name="pareto",
        alt=f"Score against visual tokens per image. No variant with at most as many tokens is better than: {described}.",
        caption="Each point is a variant, and its whisker the range of its seeds. The line joins the variants that are better "
        "than every variant with at most as many tokens.",
    )


Point = tuple[str, float, float, float, float]  # variant, tokens, mean score, lowest, highest; scores in percent


def _points(runs: Sequence[VariantResult], question_set: str) -> list[Point]:
    points = []
    for variant, mine in by_variant(runs).items():
        tokens = mine[0].num_visual_tokens_per_image
        shares = [100 * share for share in shares_right(mine, question_set)]
        if tokens is not None and shares:
            points.append((variant, tokens, mean(shares), min(shares), max(shares)))
    return points


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no point with at most as many tokens beats, from few tokens to many."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point[1], -point[2])):
        if not best or point[2] > best[-1][2]:
            best.append(point)
    return best


def _draw_points(axes: Axes, at: Sequence[Point], looks: Mapping[str, Look]) -> None:
    line, points = frontier(at), _side_by_side(at)
    axes.plot([point[1] for point in line], [point[2] for point in line], color="#999999", linewidth=1.2, zorder=1)
    for variant, tokens, score, low, high in points:
        axes.plot([tokens, tokens], [low, high], color=looks[variant].colour, linewidth=1.6, zorder=2)
        axes.plot(tokens, score, "o", color=looks[variant].colour, markersize=7, zorder=3)
    axes.set_xscale("log")
    ticks = sorted({tokens for _, tokens, *_ in at})
    axes.set_xticks(_apart(ticks), labels=[f"{tick:,.3g}" for tick in _apart(ticks)])
    axes.minorticks_off()
    low, high = ticks[0], ticks[-1]
    axes.set_xlim(low / 1.15, high * (high / low) ** 0.25 * 1.3)
    _write_names(axes, points)
    axes.set_xlabel("visual tokens per image", fontsize=TEXT_POINTS)
    axes.set_ylabel("score, %", fontsize=TEXT_POINTS)
    plain_axes(axes, grid="y")


def _side_by_side(points: Sequence[Point]) -> list[Point]:
    """Move points with the same number of tokens beside each other, so that each whisker is visible."""
    spread = np.log(max(point[1] for point in points) / min(point[1] for point in points)) or 1.0
    moved: list[Point] = []
    for variant, tokens, score, low, high in points:
        same = [point[0] for point in points if round(point[1], 1) == round(tokens, 1)]
        place = same.index(variant) - (len(same) - 1) / 2
        moved.append((variant, tokens * float(np.exp(place * 0.012 * spread)), score, low, high))
    return moved


def _apart(ticks: Sequence[float]) -> list[float]:
    """Choose ticks whose labels do not touch: neighbours are a twelfth of the logarithmic axis apart."""
    reach = np.log(ticks[-1] / ticks[0]) / 12
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if np.log(tick / kept[-1]) > reach:
            kept.append(tick)
    return kept


def _write_names(axes: Axes, points: Sequence[Point]) -> None:
    """Write each name to the right of its point; names at the same number of tokens are moved apart."""
    scores = [score for _, _, score, *_ in points]
    needed = max((max(scores) - min(scores)) * 0.065, 0.35)
    columns: dict[float, list[Point]] = {}
    for point in points:
        columns.setdefault(round(float(np.log(point[1])), 1), []).append(point)
    for column in columns.values():
        at = -np.inf
        for variant, tokens, score, *_ in sorted(column, key=lambda point: point[2]):
            at = max(at + needed, score)
            axes.annotate(
                variant,
                (tokens, score),
                xytext=(9, (at - score) / needed * (_LABEL_POINTS + 2)),
                textcoords="offset points",
                va="center",
                fontsize=_LABEL_POINTS,
                color=INK,
                parse_math=False,
            )


def kept_by_variants_figure(panels: Sequence[SelectionPanel], name: str) -> Drawing:
    """Draw the global view of an image in a row per variant: image, scores of each expert, combined scores, kept patches.

    Args:
        panels: panels of one image, one per variant.
        name: file stem.
    """
    pixels = image_pixels(panels[0].image)
    aspect = panels[0].image.width / panels[0].image.height
    width = WIDTH_INCHES / (len(_FIELDS) + 2)
    figure = new_figure(WIDTH_INCHES, len(panels) * (min(width / aspect, 3.0) + 0.12) + 0.4)
    grid = figure.subplots(len(panels), len(_FIELDS) + 2, squeeze=False)
    for row, (axes_row, panel) in enumerate(zip(grid, panels, strict=True)):
        scores, patch_grid = panel.sub_images[0], panel.plan.patch_grids[0]
        titles = ("image", *(label for _, label in _FIELDS), "kept") if row == 0 else ("",) * (len(_FIELDS) + 2)
        _show(axes_row[0], pixels, titles[0])
        axes_row[0].set_ylabel(panel.variant, fontsize=_LABEL_POINTS, color=INK, parse_math=False)
        for axes, (field, _), title in zip(axes_row[1:-1], _FIELDS, titles[1:-1], strict=True):
            _show_scores(axes, scores, field, patch_grid, title)
        _show(axes_row[-1], dim(pixels, kept_mask(scores, patch_grid)), titles[-1])
    return to_drawing(
        figure,
        name=name,
        alt=f"{panels[0].title}: scores and kept patches of {', '.join(panel.variant for panel in panels)}.",
        caption="Global view of the image. Scores go from 0 (dark) to the 99th percentile of the map (bright). A place is "
        "empty if the projector has no such scores. Kept patches are bright.",
        dpi=130,
    )


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, extent=(0, 1, 1, 0), aspect="auto")
    bare_axes(axes, title)


def _show_scores(axes: Axes, scores: SubImageScores, field: str, grid: tuple[int, int], title: str) -> None:
    values = getattr(scores, field)
    if values is not None:
        shares = np.asarray(values, dtype=np.float64).reshape(grid) * values.size
        top = max(float(np.percentile(shares, 99)), 1.0 + 1e-6)
        axes.imshow(shares, extent=(0, 1, 1, 0), aspect="auto", vmin=0, vmax=top, cmap="viridis")
    bare_axes(axes, title)
