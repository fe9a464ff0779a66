"""Write figures as files for a paper: as wide as its column, fonts inside, equal bytes for equal figures."""

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from gkd_lab.figures.grid_figures import GridFigure
from gkd_lab.store.files import write_bytes

FigureFormat = Literal["pdf", "svg", "png"]
FIGURE_FORMATS: tuple[FigureFormat, ...] = ("pdf", "svg", "png")
PNG_DPI = 300
_RC_PARAMS: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "gkd_lab"}
"""TrueType fonts in a PDF, as journals ask for, and text as text in an SVG."""
_METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def write_figure(figure: Figure, stem: Path, formats: Sequence[FigureFormat]) -> list[Path]:
    """Write a figure in each format to `stem` plus a suffix, by rename, and return the paths.

    The page is as large as the figure, and larger only for what stands beyond it. Fonts are embedded in a PDF
    (TrueType) and named in an SVG, whose text stays text; a PNG has 300 dots per inch. Raises OSError.
    """
    page = _measure_page(figure)
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
    experiment: str, figures: Iterable[GridFigure], folder: Path, formats: Sequence[FigureFormat]
) -> Iterator[Path]:
    """Write figures into a folder and yield their paths.

    Args:
        experiment: Its name; a file is called `EXPERIMENT-TASK-FIGURE.FORMAT`, such as
            `quickstart-arithmetic-heat-map.pdf`, and replaces an older one of its name.
        figures: As `draw_grid_figures` yields them.
        folder: Created where it is missing.
        formats: `pdf`, `svg` and `png`.

    Raises:
        OSError: where a file cannot be written.
    """
    for item in figures:
        name = re.sub(r"[^\w-]+", "-", f"{experiment}-{item.name}")
        yield from write_figure(item.figure, folder / name, formats)


def _measure_page(figure: Figure) -> Bbox:
    """Return the box in inches of a figure and of all that it draws, after laying it out."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    to_inches = figure.dpi_scale_trans.inverted()
    boxes = [figure.bbox_inches, figure.get_tightbbox(renderer)]
    for text in (text for axes in figure.axes for text in axes.texts):
        if not text.get_in_layout():  # such as a panel's subtitle
            boxes.append(text.get_window_extent(renderer).transformed(to_inches))
    return Bbox.union(boxes)
