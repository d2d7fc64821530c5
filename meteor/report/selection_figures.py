"""Figures of a selection: the patches that were kept, and the scores that decided (paper, Figure 4)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from meteor.formatting import format_count
from meteor.image.slicing import SlicePlan
from meteor.report.canvas import INK, TEXT_POINTS, WIDTH_INCHES, Drawing, new_figure, to_drawing
from meteor.report.data import SelectionPanel, SubImageScores

# Brightness of dropped patches.
_DIMMED = 0.28
_MAX_SIDE_PIXELS = 800
_MAX_HEIGHT_INCHES = 4.5
# Images with a larger aspect ratio have their heat maps in rows instead of columns, and the two views above each other.
_PANORAMA = 2.4
_BAR_BESIDE: dict[str, Any] = {"orientation": "vertical", "aspect": 10, "fraction": 0.02, "pad": 0.01}
_BAR_BELOW: dict[str, Any] = {"orientation": "horizontal"}
_FIELDS = (("visual_scores", "visual"), ("native_scores", "native"), ("combined_scores", "combined"))


def kept_figure(panel: SelectionPanel, name: str) -> Drawing:
    """Draw the image with kept patches bright and others dimmed, once as the global view and once as slices."""
    masks = [kept_mask(scores, grid) for scores, grid in zip(panel.sub_images, panel.plan.patch_grids, strict=True)]
    views = [("global view", masks[0])]
    if panel.plan.grid is not None:
        columns, rows = panel.plan.grid
        views.append((f"{columns} × {rows} slices", _montage(masks[1:], panel.plan)))
    pixels = image_pixels(panel.image)
    aspect = panel.image.width / panel.image.height
    stacked = aspect > _PANORAMA
    width = min(WIDTH_INCHES if stacked or len(views) == 1 else WIDTH_INCHES / 2, _MAX_HEIGHT_INCHES * aspect)
    height = width / aspect + 0.35
    num_rows, num_columns = (len(views), 1) if stacked else (1, len(views))
    figure = new_figure(max(num_columns * width, 2.5), num_rows * height)
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axes, (label, mask) in zip(all_axes, views, strict=True):
        axes.imshow(dim(pixels, mask), extent=(0, 1, 1, 0), aspect="auto")
        bare_axes(axes, f"{label}: {format_count(int(mask.sum()))} of {format_count(mask.size)} patches")
        if mask is not masks[0]:
            _draw_borders(axes, panel.plan)
    return to_drawing(
        figure,
        name=name,
        alt=f"{panel.title}: the image with kept patches bright and the others dimmed.",
        caption="Bright: kept patches. Dim and grey: dropped patches. Lines: borders of slices.",
        dpi=130,
    )


def heat_figure(panel: SelectionPanel, name: str) -> Drawing:
    """Draw image, visual, native and combined scores, for the global view and for the slices in their grid."""
    fields = [(field, label) for field, label in _FIELDS if getattr(panel.sub_images[0], field) is not None]
    views = ["global view"] if panel.plan.grid is None else ["global view", "slices"]
    in_rows = panel.image.width / panel.image.height > _PANORAMA
    figure, cells = _heat_cells(panel, num_fields=len(fields) + 1, num_views=len(views), in_rows=in_rows)
    _draw_images(cells[0], panel, _titles("image", views, in_rows))
    for row, (field, label) in zip(cells[1:], fields, strict=True):
        maps = [_heat_map(panel, field, view) for view in views]
        drawn = _draw_maps(row, maps, panel.plan, _titles(label, views, in_rows))
        bar = figure.colorbar(drawn, ax=list(row), extend="max", **(_BAR_BESIDE if in_rows else _BAR_BELOW))
        bar.ax.tick_params(labelsize=TEXT_POINTS - 1, colors=INK)
    if not in_rows:
        for axes, view in zip(cells[0], views, strict=True):
            axes.set_ylabel(view, fontsize=TEXT_POINTS, color=INK)
    labels = ", ".join(label for _, label in fields)
    return to_drawing(
        figure,
        name=name,
        alt=f"{panel.title}: heat maps of the scores ({labels}) beside the image.",
        caption="Scores in multiples of an even share: 1 means that a patch has 1/P of its sub-image's score. "
        "Each score has a colour bar, which ends at the 99th percentile.",
        dpi=130,
    )


def _heat_cells(panel: SelectionPanel, *, num_fields: int, num_views: int, in_rows: bool) -> tuple[Figure, np.ndarray]:
    """Make an empty figure; return it with its axes as (num_fields, num_views), whichever way they lie on the page."""
    aspect = panel.image.width / panel.image.height
    num_columns, num_rows = (num_views, num_fields) if in_rows else (num_fields, num_views)
    # Colour bars need space, in inches, beside the rows or below the columns.
    beside, below = (0.8, 0.0) if in_rows else (0.0, 0.7)
    cell_width = min((WIDTH_INCHES - beside) / num_columns, 3.2 * aspect, 6.0)
    figure = new_figure(num_columns * cell_width + beside, num_rows * (cell_width / aspect + 0.25) + below)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, grid if in_rows else grid.T


def _titles(label: str, views: Sequence[str], in_rows: bool) -> list[str]:
    """Return a title per view; in columns only the first view has one, as the second stands below it."""
    return [f"{label}, {view}" for view in views] if in_rows else [label, ""][: len(views)]


def kept_mask(scores: SubImageScores, grid: tuple[int, int]) -> np.ndarray:
    """Return the kept patches of a sub-image as (rows, columns) bool."""
    mask = np.zeros(grid, dtype=bool)
    mask.reshape(-1)[scores.kept_indices] = True
    return mask


def _montage(maps: Sequence[np.ndarray], plan: SlicePlan) -> np.ndarray:
    """Put the maps of all slices together as the slices lie in the image; maps come row by row and have equal shapes."""
    assert plan.grid is not None
    columns, rows = plan.grid
    return np.block([list(maps[row * columns : (row + 1) * columns]) for row in range(rows)])


def _heat_map(panel: SelectionPanel, field: str, view: str) -> np.ndarray:
    maps = []
    for scores, (rows, columns) in zip(panel.sub_images, panel.plan.patch_grids, strict=True):
        maps.append(np.asarray(getattr(scores, field), dtype=np.float64).reshape(rows, columns) * (rows * columns))
    return maps[0] if view == "global view" else _montage(maps[1:], panel.plan)


def image_pixels(image: Image.Image) -> np.ndarray:
    """Return an image as (h, w, 3) uint8, small enough for the page."""
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE_PIXELS, _MAX_SIDE_PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(small)


def dim(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Make the pixels (h, w, 3) of dropped patches grey and dark; ``mask`` is (rows, columns), True for kept patches."""
    height, width = pixels.shape[:2]
    row_of = np.arange(height) * mask.shape[0] // height
    column_of = np.arange(width) * mask.shape[1] // width
    kept = mask[np.ix_(row_of, column_of)][..., None]
    grey = pixels.mean(axis=2, keepdims=True) * _DIMMED
    return np.where(kept, pixels, grey).astype(np.uint8)


def _draw_images(row: Sequence[Axes], panel: SelectionPanel, titles: Sequence[str]) -> None:
    pixels = image_pixels(panel.image)
    for index, (axes, title) in enumerate(zip(row, titles, strict=True)):
        axes.imshow(pixels, extent=(0, 1, 1, 0), aspect="auto")
        bare_axes(axes, title)
        if index == 1:
            _draw_borders(axes, panel.plan)


def _draw_maps(row: Sequence[Axes], maps: Sequence[np.ndarray], plan: SlicePlan, titles: Sequence[str]) -> Any:
    values = np.concatenate([heat_map.reshape(-1) for heat_map in maps])
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    # Even scores (a native expert before training) would leave the colour bar without a range.
    high = max(high, low + 1e-3)
    for index, (axes, heat_map, title) in enumerate(zip(row, maps, titles, strict=True)):
        drawn = axes.imshow(heat_map, cmap="viridis", vmin=low, vmax=high, extent=(0, 1, 1, 0), aspect="auto")
        bare_axes(axes, title)
        if index == 1:
            _draw_borders(axes, plan)
    return drawn


def _draw_borders(axes: Axes, plan: SlicePlan) -> None:
    assert plan.grid is not None
    columns, rows = plan.grid
    # White lines with a dark edge are visible on bright and on dark images.
    edge = [patheffects.withStroke(linewidth=2.6, foreground="black")]
    for column in range(1, columns):
        axes.axvline(column / columns, color="white", linewidth=1.2, path_effects=edge)
    for row in range(1, rows):
        axes.axhline(row / rows, color="white", linewidth=1.2, path_effects=edge)


def bare_axes(axes: Axes, title: str) -> None:
    """Set a title, and remove ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=TEXT_POINTS, color=INK, parse_math=False)
