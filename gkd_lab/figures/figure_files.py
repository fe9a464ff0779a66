"""Write figures as files for a paper: as wide as its column, fonts inside, equal bytes for equal figures."""

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from gkd_lab.figures.grid_figures import GridFigure
from gkd_lab.figures.style import apply_style
from gkd_lab.store.files import write_bytes

FigureFormat = Literal["pdf", "svg", "png"]
FIGURE_FORMATS: tuple[FigureFormat, ...] = ("pdf", "svg", "png")
PNG_DPI = 300
MARGIN = 0.03
"""Inches around what is drawn."""
FONT_SIZE, MIN_FONT_SIZE = 8.0, 6.0
"""Points of the usual text on a page of given width, and below which no text shrinks."""
MIN_PANEL_SHARE = 0.55
"""Share of its own width to which a panel may shrink; below it there are fewer panels in a row."""
MIN_HEIGHT_SHARE, MAX_HEIGHT_SHARE = 0.7, 0.85
"""Range of a panel's height, as a share of its own."""
MAX_LEGEND_SHARE = 0.25
"""Share of the width that a legend beside the panels may take; a wider one stands below them."""
MAX_LAYOUTS = 6
WIDTH_TOLERANCE = 0.005
"""Inches by which a page may miss its width; LaTeX needs no better."""
_RC_PARAMS: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "gkd_lab"}
"""TrueType fonts in a PDF, as journals ask for, and text as text in an SVG."""
_METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def write_figure(figure: Figure, stem: Path, formats: Sequence[FigureFormat]) -> list[Path]:
    """Write a figure in each format to `stem` plus a suffix, by rename, and return the paths.

    The page is as large as what is drawn, with a margin. Fonts are embedded in a PDF (TrueType) and named in
    an SVG, whose text stays text; a PNG has 300 dots per inch. Raises OSError.
    """
    page = _measure(figure).padded(MARGIN)
    paths = []
    for suffix in formats:
        buffer = BytesIO()
        with mpl.rc_context(_RC_PARAMS):
            figure.savefig(buffer, format=suffix, dpi=PNG_DPI, bbox_inches=page, metadata=_METADATA[suffix])
        path = stem.with_name(f"{stem.name}.{suffix}")
        write_bytes(path, buffer.getvalue())
        paths.append(path)
    return paths


def write_grid_figures(
    experiment: str,
    figures: Iterable[GridFigure],
    folder: Path,
    formats: Sequence[FigureFormat],
    width: float | None = None,
) -> Iterator[Path]:
    """Write figures into a folder and yield their paths.

    Args:
        experiment: Its name; a file is called `EXPERIMENT-TASK-FIGURE.FORMAT`, such as
            `quickstart-arithmetic-heat-map.pdf`, and replaces an older one of its name.
        figures: As `draw_grid_figures` yields them.
        folder: Created where it is missing.
        formats: `pdf`, `svg` and `png`.
        width: Inches of each page, such as 3.25 for a column; None: as the report has it.

    Raises:
        OSError: where a file cannot be written.
    """
    for item in figures:
        if width is not None:
            fit_to_width(item.figure, width)
        name = re.sub(r"[^\w-]+", "-", f"{experiment}-{item.name}")
        yield from write_figure(item.figure, folder / name, formats)


def fit_to_width(figure: Figure, width: float) -> None:
    """Lay a figure out again, in place, for a page of `width` inches with its margin.

    Text and lines shrink with the panels, to text of 6 to 8 points; panels that would be too narrow stand
    below each other, and a legend that would take too much of the width below them all.
    """
    ratio = _arrange_panels(figure, width)
    with apply_style():
        sizes = [_get_size(text) for text in figure.findobj(Text) if text.get_text()]
        smallest, usual = min(sizes, default=MIN_FONT_SIZE), mpl.rcParams["font.size"]
        _scale_artists(figure, min(1.0, max(ratio, MIN_FONT_SIZE / smallest), FONT_SIZE / usual))
        for legend in list(figure.legends):
            if legend.get_window_extent().width > MAX_LEGEND_SHARE * width * figure.dpi:
                _move_legend_below(figure, legend, width)
    for _ in range(MAX_LAYOUTS):
        excess = _measure(figure).width + 2 * MARGIN - width
        if abs(excess) < WIDTH_TOLERANCE:
            break
        figure.set_figwidth(max(figure.get_figwidth() - excess, width / 4))


def _arrange_panels(figure: Figure, width: float) -> float:
    """Set rows of panels and size for a page of `width` inches; return a panel's new width over its old."""
    places = {axes: place for axes in figure.axes if (place := axes.get_subplotspec()) is not None}
    grid = next(iter(places.values())).get_gridspec()
    panel_width, panel_height = figure.get_figwidth() / grid.ncols, figure.get_figheight() / grid.nrows
    columns = max(1, min(grid.ncols, int(width / (MIN_PANEL_SHARE * panel_width))))
    drawn = [axes for axes in places if axes.axison]
    if columns < grid.ncols:
        for unused in places.keys() - set(drawn):
            unused.remove()
        grid = figure.add_gridspec(ceil(len(drawn) / columns), columns)
        for number, axes in enumerate(drawn):
            axes.set_subplotspec(grid[number // columns, number % columns])
            if number % columns == 0:  # an inner panel with a shared axis had no numbers at its left
                axes.tick_params(labelleft=True)
    ratio = width / (columns * panel_width)
    height = panel_height * min(max(ratio, MIN_HEIGHT_SHARE), MAX_HEIGHT_SHARE)
    figure.set_size_inches(width, height * grid.nrows)
    return ratio


def _scale_artists(figure: Figure, scale: float) -> None:
    """Multiply the sizes of text, lines, markers and labels' offsets, which are in points, by `scale`."""
    for text in figure.findobj(Text):
        text.set_fontsize(_get_size(text) * scale)
        if isinstance(text, Annotation) and text.anncoords == "offset points":
            text.xyann = (text.xyann[0] * scale, text.xyann[1] * scale)
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * scale)
        line.set_markersize(line.get_markersize() * scale)
    for collection in figure.findobj(Collection):
        collection.set_linewidth((np.atleast_1d(collection.get_linewidth()) * scale).tolist())


def _get_size(text: Text) -> float:
    """Return the size of a text in points."""
    return float(text.get_fontproperties().get_size_in_points())


def _move_legend_below(figure: Figure, legend: Legend, width: float) -> None:
    """Put a legend of the figure below its panels, in as many columns as fit."""
    texts, handles = legend.get_texts(), [handle for handle in legend.legend_handles if handle is not None]
    columns = max(1, int(0.95 * width * figure.dpi / legend.get_window_extent().width))
    legend.remove()
    figure.legend(
        handles,
        [text.get_text() for text in texts],
        loc="outside lower center",
        ncols=min(columns, len(texts)),
        fontsize=_get_size(texts[0]),
    )


def _measure(figure: Figure) -> Bbox:
    """Return the box in inches around all that a figure draws, after laying it out."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = [figure.get_tightbbox(renderer)]
    for text in (text for axes in figure.axes for text in axes.texts):
        if not text.get_in_layout():  # such as a panel's subtitle
            boxes.append(text.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted()))
    return Bbox.union(boxes)
