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
from gkd_lab.figures.figure_files import FIGURE_FORMATS, write_figure
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
    assert {"Reverse", "JSD(0.1)", "+40.0"} <= set(words)
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
@pytest.mark.parametrize("draw", [heat_map, curves, bars])
def test_a_page_has_its_width_and_text_of_a_readable_size(
    draw: Callable[..., Figure], width: float, tmp_path: Path
) -> None:
    methods = {"method": ["sft", "seqkd", "gkd"], "student": ["small", "base"]}
    table = build_table(Store(tmp_path), **(methods if draw is bars else {}))
    figure = draw(table, "accuracy", width=width)
    (path,) = write_figure(figure, tmp_path / "figure", ["pdf"])
    assert read_pdf_width(path) == pytest.approx(width, abs=0.01)
    assert 7 <= min(list_text_sizes(figure)) <= max(list_text_sizes(figure)) <= 9


def test_panels_that_would_be_too_narrow_stand_below_each_other(tmp_path: Path) -> None:
    store, grid = Store(tmp_path), build_grid(grid={"lmbda": [0, 0.5, 1]})
    fill_store(grid, store)
    places = {
        width: [axes.get_subplotspec() for axes in loss_curves(grid, store, width=width).axes]
        for width in (5.5, 3.25, 2.5)
    }
    rows = {width: [place.rowspan.start for place in places[width]] for width in places}  # type: ignore[union-attr]
    assert rows == {5.5: [0, 0, 0], 3.25: [0, 0, 1], 2.5: [0, 1, 2]}
    for axes in loss_curves(grid, store, width=2.5).axes:
        assert any(label.get_visible() for label in axes.get_yticklabels())


def test_a_legend_stands_below_the_panels_within_the_page(tmp_path: Path) -> None:
    for width in (10.0, 3.25):
        figure = curves(build_table(Store(tmp_path)), "accuracy", width=width)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["Forward KL", "JSD(0.1)", "JSD(0.5)", "JSD(0.9)", "Reverse KL"]
        (axes,) = figure.axes
        extent = legend.get_window_extent()
        assert extent.y1 < axes.get_window_extent().y0
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
