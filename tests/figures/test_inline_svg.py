"""Figures on a page: a piece for each panel, that a narrow screen stacks."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gkd_lab.figures import bars, curves, heat_map, loss_curves
from gkd_lab.figures.inline_svg import MAX_SCALED_WIDTH, render_inline_svg
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store


def list_pieces(page: str) -> list[tuple[str, float, list[str]]]:
    """Return (class of the box around it, width, texts) of each `<svg>`."""
    root = ElementTree.fromstring(page)
    parents = {child: parent for parent in root.iter() for child in parent}
    pieces = []
    for svg in root.iter("svg"):
        width = float(svg.get("viewBox", "").split()[2])
        assert float(re.findall(r"--w: (\d+)", svg.get("style", ""))[0]) == pytest.approx(width, abs=1)
        texts = [text for element in svg.iter() for text in [(element.text or "").strip()] if text]
        pieces.append((parents[svg].get("class", ""), width, texts))
    return pieces


def test_each_panel_is_a_piece_then_the_colour_bar(tmp_path: Path) -> None:
    students: list[object] = ["small", "base"]
    grid, store = (
        build_grid(grid={"lmbda": [0, 1], "beta": [0, 0.5, 1], "student": students}),
        Store(tmp_path),
    )
    fill_store(grid, store)
    table = build_long_table(grid, store)
    pieces = list_pieces(render_inline_svg(heat_map(table, "accuracy"), "map", "label"))
    assert [box for box, _, _ in pieces] == ["panels two"] * 3
    small, base, bar = (" ".join(texts) for _, _, texts in pieces)
    assert "student small" in small and "+40.0" in small and "student base" not in small
    assert "student base" in base and "+40.0" in base
    assert "gain in accuracy (points)" in bar and "+40.0" not in bar
    assert max(width for _, width, _ in pieces) < MAX_SCALED_WIDTH
    *_, legend = list_pieces(render_inline_svg(curves(table, "accuracy"), "curves", "label"))
    assert legend[2] == ["Forward KL", "JSD(0.5)", "Reverse KL"]


def test_panels_with_the_labels_of_their_row_stay_together_in_a_box_of_their_own(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store)
    panels, _ = list_pieces(render_inline_svg(loss_curves(grid, store), "losses", "label"))
    assert panels[0] == "scroll" and panels[1] > MAX_SCALED_WIDTH
    assert {"λ = 0", "λ = 0.5", "λ = 1", "loss"} <= set(panels[2])
    methods = build_grid(grid={"method": ["sft", "seqkd", "gkd"]})
    fill_store(methods, store)
    (piece,) = list_pieces(
        render_inline_svg(bars(build_long_table(methods, store), "accuracy"), "b", "label")
    )
    assert piece[0] == "scroll"


def test_a_figure_of_one_panel_is_a_column(tmp_path: Path) -> None:
    grid, store = build_grid(), Store(tmp_path)
    fill_store(grid, store)
    page = render_inline_svg(heat_map(build_long_table(grid, store), "accuracy"), "map", "label")
    assert [box for box, _, _ in list_pieces(page)] == ["panels one"] * 2
    assert "<image" not in page  # the colour bar is a vector drawing


def test_no_text_of_a_panel_lies_outside_its_piece(tmp_path: Path) -> None:
    grid, store = build_grid(grid={"lmbda": [0, 1], "student": ["small", "base"]}), Store(tmp_path)
    fill_store(grid, store)
    page = render_inline_svg(heat_map(build_long_table(grid, store), "accuracy"), "map", "label")
    for svg in ElementTree.fromstring(page).iter("svg"):
        left, top, width, height = map(float, svg.get("viewBox", "").split())
        for text in svg.iter("text"):
            place = re.search(
                r"(?:translate\(|rotate\(\S+ )([-\d.]+)[ ,]+([-\d.]+)\)", text.get("transform", "")
            )
            x, y = map(float, place.groups() if place else (text.get("x", ""), text.get("y", "")))
            assert left <= x <= left + width and top <= y <= top + height
