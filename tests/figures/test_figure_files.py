"""Figures as files: fonts, page size, text sizes, panels and legends on a narrow page."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gkd_lab.figures import bars, curves, heat_map, loss_curves
from gkd_lab.figures.figure_files import FIGURE_FORMATS, fit_to_width, write_figure
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store


def build_table(store: Store, **axes: list[object]) -> pd.DataFrame:
    grid = build_grid(grid=axes or {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]})
    fill_store(grid, store)
    return build_long_table(grid, store)


def read_pdf_width(path: Path) -> float:
    """Return the width in inches of the page of a PDF."""
    (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", path.read_bytes())
    return float(box) / 72


def list_text_sizes(figure: Figure) -> list[float]:
    return [
        text.get_fontproperties().get_size_in_points() for text in figure.findobj(Text) if text.get_text()
    ]


def test_a_pdf_embeds_truetype_fonts_and_an_svg_keeps_its_text(tmp_path: Path) -> None:
    figure = heat_map(build_table(Store(tmp_path)), "accuracy")
    pdf, svg, png = write_figure(figure, tmp_path / "map", FIGURE_FORMATS)
    content = pdf.read_bytes()
    assert b"/FontFile2" in content and b"/Type3" not in content
    words = [element.text for element in ElementTree.parse(svg).iter() if element.tag.endswith("}text")]
    assert "Reverse KL" in words and "+40.0" in words
    assert Image.open(png).info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_equal_figures_are_equal_bytes(tmp_path: Path) -> None:
    table = build_table(Store(tmp_path))
    first, second = (
        [
            path.read_bytes()
            for path in write_figure(curves(table, "accuracy"), tmp_path / name, FIGURE_FORMATS)
        ]
        for name in "ab"
    )
    assert first == second


@pytest.mark.parametrize("width", [3.25, 5.5])
@pytest.mark.parametrize("draw", [heat_map, curves])
def test_a_page_has_its_width_and_text_of_a_readable_size(
    draw: Callable[[pd.DataFrame, str], Figure], width: float, tmp_path: Path
) -> None:
    figure = draw(build_table(Store(tmp_path)), "accuracy")
    fit_to_width(figure, width)
    (path,) = write_figure(figure, tmp_path / "figure", ["pdf"])
    assert read_pdf_width(path) == pytest.approx(width, abs=0.01)
    tick = figure.axes[0].get_xticklabels()[0]
    assert tick.get_fontproperties().get_size_in_points() <= 8 + 1e-9
    assert min(list_text_sizes(figure)) >= 6 - 1e-9


def test_panels_that_would_be_too_narrow_stand_below_each_other(tmp_path: Path) -> None:
    store, grid = Store(tmp_path), build_grid(grid={"lmbda": [0, 0.5, 1]})
    fill_store(grid, store)
    figure = loss_curves(grid, store)
    columns = [axes.get_subplotspec().colspan.start for axes in figure.axes]  # type: ignore[union-attr]
    assert columns == [0, 1, 2]
    fit_to_width(figure, 3.25)
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [place.rowspan.start for place in places] == [0, 1, 2]  # type: ignore[union-attr]
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert any(label.get_visible() for label in axes.get_yticklabels())
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops == sorted(tops, reverse=True)


def test_a_wide_legend_moves_below_the_panels(tmp_path: Path) -> None:
    for width, is_below in ((10.0, False), (3.25, True)):
        figure = curves(build_table(Store(tmp_path)), "accuracy")
        fit_to_width(figure, width)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["Forward KL", "JSD(0.1)", "JSD(0.5)", "JSD(0.9)", "Reverse KL"]
        (axes,) = figure.axes
        assert (legend.get_window_extent().y1 < axes.get_window_extent().y0) == is_below


def test_a_figure_of_bars_fits_a_column(tmp_path: Path) -> None:
    table = build_table(Store(tmp_path), method=["sft", "seqkd", "imitkd", "gkd"])
    figure = bars(table, "accuracy")
    fit_to_width(figure, 3.25)
    (path,) = write_figure(figure, tmp_path / "bars", ["pdf"])
    assert read_pdf_width(path) == pytest.approx(3.25, abs=0.01)
