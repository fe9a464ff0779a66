"""Layout of a figure: panels that fill its rows, their titles, one legend, one colour bar.

A figure is as wide as a column or the text of a LaTeX page, so that it is printed at its own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from gkd_lab.figures.style import (
    COLUMN_WIDTH,
    LABEL_SIZE,
    MUTED,
    SCREEN_DPI,
    SMALL_SIZE,
    TEXT_WIDTH,
    TITLE_SIZE,
)
from gkd_lab.tables.divergences import CellDivergence

MAX_COLUMNS = 3
PANEL_WIDTH = 2.3
"""Inches that a panel of curves needs, with its labels."""
LEGEND_WIDTH = 3.2
"""Inches that a legend is wide at most: it fits a column, and a phone."""
BAR_LENGTH, BAR_THICKNESS, BAR_ROW_HEIGHT = 2.2, 0.09, 0.5
"""Inches of a colour bar, and of a row of bars with their labels."""
TICK_STEPS = [1, 2, 2.5, 5, 10]
"""Round steps between the ticks of an axis."""
BAR_STEPS = 101
"""Colours of a colour bar: odd, so that one is of 0."""

SUBTITLE = "_subtitle"
"""Label of the artist of the small lines above a panel; no legend lists it."""


@dataclass(frozen=True)
class ColorBar:
    """A colour bar's colours, the label of its quantity, and the values that they stand for."""

    colormap: Colormap
    norm: Normalize
    label: str
    values: Sequence[float]


def create_axes(
    count: int,
    height: float,
    *,
    panel_width: float = PANEL_WIDTH,
    width: float | None = None,
    sharey: bool = False,
    columns: int = MAX_COLUMNS,
    stretches: bool = True,
    has_bar: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return (figure, list of `count` axes) in full rows, each row `height` inches.

    The figure is `width` inches wide: by default a column for one panel, else the text of a page, and at
    least `panel_width`. A row has at most `columns` panels of at least `panel_width`. Panels
    of the last row are stretched to fill it or, without `stretches`, one place is left for `find_spare_axes`.
    With `sharey` panels have one y axis, labelled on the left of each row. With `has_bar` there is a place
    for `add_color_bars`: a strip below the panels if none is left among them.
    """
    if width is None:
        width = max(COLUMN_WIDTH if count <= 1 else TEXT_WIDTH, panel_width)
    columns = _choose_columns(count, min(columns, int(width / panel_width + 1e-6)))
    rows = math.ceil(count / columns) or 1
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.04, hspace=0.04)
    figure = Figure(figsize=(width, rows * height), dpi=SCREEN_DPI, layout=engine)
    in_last_row = (count - 1) % columns + 1 if count else 0
    stretches = stretches and not has_bar and 0 < in_last_row < columns
    grid = figure.add_gridspec(rows, columns * (in_last_row if stretches else 1))
    axes: list[Axes] = []
    for number in range(count if stretches else rows * columns):
        row, column = divmod(number, columns)
        span = grid.ncols // (in_last_row if stretches and row == rows - 1 else columns)
        first = axes[0] if sharey and axes else None
        axes.append(figure.add_subplot(grid[row, column * span : (column + 1) * span], sharey=first))
        if sharey and column:
            axes[-1].tick_params(labelleft=False)
    for unused in axes[count:]:
        unused.set_axis_off()
    if has_bar and count == len(axes):
        total = figure.get_figheight() + BAR_ROW_HEIGHT
        figure.set_figheight(total)
        engine.set(rect=(0, BAR_ROW_HEIGHT / total, 1, 1 - BAR_ROW_HEIGHT / total))
    return figure, axes[:count]


def _choose_columns(count: int, limit: int) -> int:
    """Return the number of columns, at most `limit`, that leaves the fewest blank places in the last row.

    Of equal ones the largest; 1 only where no more fit.
    """
    candidates = range(min(count, max(limit, 1)), 1, -1)
    return min(candidates, key=lambda columns: -count % columns, default=1)


def count_columns(axes: Sequence[Axes]) -> int:
    """Return the number of panels of the first row."""
    places = [panel.get_subplotspec() for panel in axes]
    return sum(place is not None and place.is_first_row() for place in places)


def find_spare_axes(figure: Figure) -> Axes | None:
    """Return the axes, switched off, of the place that the panels leave, for a legend or colour bars."""
    return next((axes for axes in figure.axes if not axes.axison), None)


def set_panel_title(axes: Axes, title: str, subtitle: str = "", width: float | None = None) -> None:
    """Write a bold title and muted lines of small type above a panel, both wrapped to its width in inches.

    `width` None: the panel's share of the figure, less the labels of its y axis.
    For panels without ticks above them: a fixed `y` saves the search for them, a fifth of the time.
    """
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and place is not None
    share = len(place.colspan) / place.get_gridspec().ncols
    points = 72 * (figure.get_figwidth() * share - 0.4 if width is None else width)
    lines = [line for text in subtitle.splitlines() for line in _wrap_text(text, points, SMALL_SIZE)]
    title = "\n".join(_wrap_text(title, points, TITLE_SIZE, "bold"))
    axes.set_title(title, pad=5 + 1.3 * SMALL_SIZE * len(lines), y=1.0)
    note = axes.annotate(
        "\n".join(lines), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=SMALL_SIZE, va="bottom", linespacing=1.25, annotation_clip=False,
    )  # fmt: skip
    note.set_in_layout(False)
    note.set_label(SUBTITLE)


def _wrap_text(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Return the fewest lines of a text that are `width` points wide at most, each about as wide."""
    font = FontProperties(size=size, weight=weight)
    widths = [
        (word, text_to_path.get_text_width_height_descent(f"{word} ", font, ismath=False)[0])
        for word in text.split()
    ]
    lines = _fill_lines(widths, width)
    while len(lines) > 1 and len(narrower := _fill_lines(widths, 0.95 * width)) == len(lines):
        lines, width = narrower, 0.95 * width
    return lines


def _fill_lines(words: Sequence[tuple[str, float]], width: float) -> list[str]:
    """Return lines of words with their widths, each as long as it fits; a longer word is a line by itself."""
    lines: list[list[str]] = []
    left = 0.0
    for word, word_width in words:
        if not lines or word_width > left:
            lines.append([])
            left = width
        lines[-1].append(word)
        left -= word_width
    return [" ".join(line) for line in lines]


def add_legend(figure: Figure, axes: Sequence[Axes], extra_handles: Sequence[Artist] = ()) -> None:
    """Add one legend for all panels, an entry per label: in the spare place, else below them.

    The figure grows by a legend below. Nothing is added where nothing has a label.
    """
    drawn = {handle.get_label(): handle for panel in axes for handle in panel.get_legend_handles_labels()[0]}
    handles = [*drawn.values(), *extra_handles]
    names = [str(handle.get_label()) for handle in handles]
    spare = find_spare_axes(figure)
    if not handles:
        return
    if spare is not None:
        spare.legend(handles, names, loc="center")
        return
    limit = min(LEGEND_WIDTH, figure.get_figwidth())
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=columns)
        extent = legend.get_window_extent()
        if extent.width <= limit * figure.dpi or columns == 1:
            figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)
            return
        legend.remove()


def add_divergence_legend(
    figure: Figure, axes: Sequence[Axes], divergences: Sequence[CellDivergence]
) -> None:
    """Add one legend for all panels, in the order of `divergences`; none where nothing is drawn."""
    handles = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    add_legend(figure, [], [handles[d.label] for d in divergences if d.label in handles])


def add_color_bars(figure: Figure, bars: Sequence[ColorBar]) -> None:
    """Add horizontal colour bars, each with the label of its quantity: in the spare place, else below.

    Takes a figure of `create_axes(has_bar=True)`. A bar shows the range of its values, and 0 where the
    colours diverge around it.
    """
    for number, bar in enumerate(bars):
        axes = _add_bar_axes(figure, (number + 0.5) / len(bars))
        mappable = ScalarMappable(bar.norm, bar.colormap.resampled(BAR_STEPS))
        color_bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
        assert color_bar.solids is not None
        color_bar.solids.set(rasterized=False, edgecolor="face")  # vectors, without seams
        is_signed = bar.norm.vmin is not None and bar.norm.vmin == -(bar.norm.vmax or 0)
        shown = [*bar.values, 0.0] if is_signed else list(bar.values)
        if min(shown) < max(shown):
            axes.set_xlim(min(shown), max(shown))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_format_tick))
        axes.tick_params(length=2, labelsize=SMALL_SIZE)
        axes.grid(False)
        color_bar.outline.set_visible(False)
        color_bar.set_label(bar.label, fontsize=LABEL_SIZE)


def _add_bar_axes(figure: Figure, place: float) -> Axes:
    """Add the axes of a colour bar at a share of the spare place's height, or of the row below."""
    spare, size = find_spare_axes(figure), figure.get_size_inches()
    width, height = BAR_LENGTH / size[0], BAR_THICKNESS / size[1]
    if spare is None:
        bottom = (BAR_ROW_HEIGHT - 0.03) / size[1] - height
        axes = figure.add_axes((place - width / 2, bottom, width, height))
    else:
        axes = spare.inset_axes((0, 0, 1, 1))
        axes.set_in_layout(False)
        box = spare.get_position
        axes.set_axes_locator(
            lambda *_: Bbox.from_bounds(
                box().x0 + (box().width - width) / 2, box().y1 - place * box().height, width, height
            )
        )
    axes.set_label("<colorbar>")
    return axes


def _format_tick(value: float, position: int | None = None) -> str:
    """Format a tick without trailing zeros, with a true minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
