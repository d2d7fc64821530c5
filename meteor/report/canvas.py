"""Style of all figures: sizes, inks, one colour per variant, PNG files.

Figures are drawn with Agg objects and never with pyplot, whose global state would outlive a report.
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.typing import LineStyleType

# A figure of this width is shown at CSS_PIXELS_PER_INCH, at which a text of 10 pt is about 14 px high.
WIDTH_INCHES = 9.0
CSS_PIXELS_PER_INCH = 100
TEXT_POINTS = 10.0
# More variants than this do not fit side by side: tables are transposed, and long contents show the first variants only.
MANY_VARIANTS = 8
INK = "#222222"
FAINT_INK = "#d8d8d8"

# Okabe and Ito's colours, which colour-blind readers can distinguish, without the yellow that is too pale on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_LINE_STYLES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")


@dataclass(frozen=True)
class Look:
    """Look of a variant: a colour, and the line style and hatch that distinguish variants of the same colour."""

    colour: str
    line_style: LineStyleType
    hatch: str


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: file stem, unique in a report.
        png: content of the PNG file.
        width, height: size on the page in CSS pixels.
        alt: description for readers who cannot see the figure.
        caption: explanation of how to read the figure.
    """

    name: str
    png: bytes
    width: int
    height: int
    alt: str
    caption: str


def variant_looks(names: Sequence[str]) -> dict[str, Look]:
    """Return a look per variant, used in every figure; line style and hatch change once the colours are used up."""
    looks = itertools.cycle(
        Look(colour, line_style, hatch)
        for line_style, hatch in zip(_LINE_STYLES, _HATCHES, strict=True)
        for colour in _PALETTE
    )
    return {name: next(looks) for name in names}


def new_figure(width_inches: float, height_inches: float) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, *, grid: str | None) -> None:
    """Draw only the left and bottom side of the frame, a faint grid along ``grid`` ("x", "y" or None), readable ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(labelsize=TEXT_POINTS, colors=INK, length=3)
    axes.set_axisbelow(True)
    if grid == "x":
        axes.grid(axis="x", color=FAINT_INK, linewidth=0.8)
    elif grid == "y":
        axes.grid(axis="y", color=FAINT_INK, linewidth=0.8)


def to_drawing(figure: Figure, *, name: str, alt: str, caption: str, dpi: int = 170) -> Drawing:
    """Render a figure; ``dpi`` is above the page's 100, so that the figure is sharp in print and on dense screens."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    width, height = figure.get_size_inches()
    return Drawing(
        name=name,
        png=buffer.getvalue(),
        width=round(width * CSS_PIXELS_PER_INCH),
        height=round(height * CSS_PIXELS_PER_INCH),
        alt=alt,
        caption=caption,
    )
