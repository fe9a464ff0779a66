"""Layout of figures: full rows, everything on the page, nothing over anything else, colour scales."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from gkd_lab.figures import (
    bars,
    curves,
    heat_map,
    interquartile_means,
    lines,
    loss_curves,
    profiles,
    reward_gains,
    tradeoff,
)
from gkd_lab.figures.heat_maps import choose_colors
from gkd_lab.figures.layout import SUBTITLE, create_axes
from gkd_lab.figures.style import COLUMN_WIDTH, GAIN_COLORS, SCORE_COLORS, TEXT_WIDTH
from gkd_lab.report.notebooks import add_gain, combine_with_paper, load_paper_table
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from ..tables.synthetic_store import build_grid, fill_store

FULL_MAP = {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 0.5, 0.9, 1]}


def build_table(folder: Path, start_score: float = 30.0, **axes: list[object]) -> pd.DataFrame:
    grid = build_grid(grid={**FULL_MAP, **axes})
    fill_store(grid, Store(folder), start_score=start_score)
    return build_long_table(grid, Store(folder))


def list_boxes(figure: Figure) -> list[Bbox]:
    """Return the boxes of the panels with their titles, of colour bars and of legends, as drawn."""
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        if axes.axison:
            parts = [axes.get_tightbbox(), *(text.get_window_extent() for text in axes.texts)]
            boxes.append(Bbox.union([part for part in parts if part is not None]))
        else:
            boxes += [child.get_tightbbox() for child in axes.child_axes]
            boxes += [legend.get_window_extent() for legend in [axes.get_legend()] if legend]
    return boxes + [legend.get_window_extent() for legend in figure.legends]


def check_page(figure: Figure) -> None:
    """Check that nothing is cut off or lies over something else, to a pixel of a hundredth of an inch."""
    boxes = list_boxes(figure)
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
    for a, b in combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1


def check_figure(figure: Figure) -> None:
    """Check a figure's page and that its text is of 7 to 9 points."""
    check_page(figure)
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert 7 <= min(sizes) <= max(sizes) <= 9


def list_meshes(figure: Figure) -> list[QuadMesh]:
    return [axes.collections[0] for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]


def find_color_bar(figure: Figure) -> Axes:
    """Return the axes of the figure's one colour bar."""
    axes = [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]
    (bar,) = [each for each in axes if each.get_label() == "<colorbar>"]
    return bar


@pytest.mark.parametrize(
    ("count", "columns_by_row"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3]), (7, [2, 2, 2, 1]), (9, [3, 3, 3])],
)
def test_the_panels_of_each_row_fill_it(count: int, columns_by_row: list[int]) -> None:
    figure, axes = create_axes(count, 1.5, panel_width=1.5)
    figure.draw_without_rendering()
    rows: dict[int, list[Bbox]] = {}
    for panel in axes:
        rows.setdefault(panel.get_subplotspec().rowspan.start, []).append(panel.get_tightbbox())  # type: ignore[union-attr]
    assert [len(boxes) for boxes in rows.values()] == columns_by_row
    for boxes in rows.values():
        gaps = [0.0, *(edge for box in boxes for edge in (box.x0, box.x1)), figure.bbox.width]
        assert max(right - left for left, right in zip(gaps[::2], gaps[1::2], strict=True)) < 0.2 * figure.dpi
    assert figure.get_figwidth() == (COLUMN_WIDTH if count == 1 else TEXT_WIDTH)


@pytest.mark.parametrize("width", [None, 3.25, 5.5, 11.0])
@pytest.mark.parametrize("axes", [{}, {"student": ["small", "base"]}, {"learning_rate": [1e-3, 2e-3, 3e-3]}])
@pytest.mark.parametrize("draw", [heat_map, curves])
def test_nothing_is_cut_off_or_hidden(
    draw: Callable[..., Figure], axes: dict[str, list[object]], width: float | None, tmp_path: Path
) -> None:
    figure = draw(build_table(tmp_path, **axes), "accuracy", width=width)
    check_figure(figure)
    assert width is None or figure.get_figwidth() == width


def test_bars_lines_and_loss_curves_are_on_the_page(tmp_path: Path) -> None:
    run = build_table(tmp_path / "a", method=["sft", "gkd_supervised", "gkd"], beta=[0, 0.1], lmbda=[1])
    paper = load_paper_table("9", axes=["method"])
    check_figure(bars(add_gain(combine_with_paper(run, paper), "accuracy"), "gain in accuracy"))
    check_figure(
        lines(load_paper_table("3", axes=["method", "train_rows"]), "rouge2", "train_rows", "method")
    )
    grid, store = build_grid(), Store(tmp_path / "b")
    fill_store(grid, store)
    check_figure(loss_curves(grid, store))


@pytest.mark.parametrize("width", [None, 3.25, 5.5])
@pytest.mark.parametrize("draw", [interquartile_means, profiles])
def test_figures_over_all_tasks_are_on_the_page(
    draw: Callable[..., Figure], width: float | None, tmp_path: Path
) -> None:
    axes: dict[str, list[object]] = {"task": ["arithmetic", "translation"], "lmbda": [0, 1], "beta": [0, 1]}
    grid = build_grid(task=None, grid={**axes, "seed": [0, 1]})
    fill_store(grid, Store(tmp_path))
    check_figure(draw(build_long_table(grid, Store(tmp_path)), width=width))


@pytest.mark.parametrize("width", [None, 3.25, 5.5])
def test_scatter_figures_are_on_the_page(width: float | None, tmp_path: Path) -> None:
    check_figure(tradeoff(load_paper_table("4"), "rouge2", "self_bleu", width=width))
    rewarded = {"grid": {"method": ["gkd", "rlef"], "alpha": [0.05, 0.5, 1], "seed": [0, 1]}}
    grid = build_grid(**rewarded, reward="exact_match", beta=0.9, lmbda=1)
    fill_store(grid, Store(tmp_path))
    table = build_long_table(grid, Store(tmp_path))
    check_figure(reward_gains(table, "accuracy", "accuracy", width=width))


def test_lines_of_gains_have_the_start_at_0_and_a_place_for_each_value() -> None:
    gains = add_gain(load_paper_table("1", axes=["method"]), "rouge2")
    (axes,) = lines(gains, "gain in rouge2", x_axis="student", line_axis="method").axes
    drawn = {str(line.get_label()): line for line in axes.get_lines()}
    assert set(drawn["SFT student"].get_ydata()) == {0}
    assert axes.get_xlim() == pytest.approx((-0.35, 2.35))
    shares = lines(load_paper_table("8"), "accuracy", x_axis="lmbda", line_axis="divergence")
    assert shares.axes[0].get_xlabel() == "λ, share of student-written batches"


def test_three_maps_leave_the_fourth_place_to_the_colour_bar(tmp_path: Path) -> None:
    figure = heat_map(build_table(tmp_path, learning_rate=[1e-3, 2e-3, 3e-3]), "accuracy")
    (spare,) = [axes for axes in figure.axes if not axes.axison]
    bar = find_color_bar(figure)
    assert bar in spare.child_axes
    assert bar.get_xlabel() == "gain in accuracy (points)"


def test_a_run_and_the_paper_share_one_scale_around_0_of_square_roots(tmp_path: Path) -> None:
    """The run gains up to 40, the paper up to 8.8."""
    table = combine_with_paper(build_table(tmp_path), load_paper_table("7"))
    figure = heat_map(table, "accuracy")
    run, paper = list_meshes(figure)
    assert run.norm is paper.norm and isinstance(run.norm, FuncNorm)
    assert (run.norm.vmin, run.norm.vmax) == (-40, 40)
    assert run.norm([-40, -10, 0, 10, 40]).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert find_color_bar(figure).get_xlabel() == "gain in accuracy (points), square-root scale"
    assert find_color_bar(figure).get_xlim() == (0, 40)


def test_a_map_in_which_every_cell_loses_has_the_colours_of_losses(tmp_path: Path) -> None:
    figure = heat_map(build_table(tmp_path, start_score=90.0), "accuracy")
    (mesh,) = list_meshes(figure)
    figure.draw_without_rendering()
    assert mesh.get_array().max() < 0
    colors = mesh.get_facecolors()
    assert (colors[:, 0] > colors[:, 2] + 0.05).all()  # redder than blue
    strength = colors[:, 0] - colors[:, 2]
    worst, best = int(mesh.get_array().argmin()), int(mesh.get_array().argmax())
    assert np.linalg.norm(colors[worst] - GAIN_COLORS(0.5)) > np.linalg.norm(colors[best] - GAIN_COLORS(0.5))
    assert strength[best] < strength.max()
    low, high = find_color_bar(figure).get_xlim()
    assert (low, high) == (-54, 0)  # 36 - 90: forward to reverse KL at lmbda 0


def test_gains_alone_are_blue_and_0_is_neutral_whatever_the_other_values() -> None:
    for values in ([5.0, 9.0], [-3.0, 9.0], [-9.0, -1.0], [0.0]):
        colormap, norm = choose_colors([values], is_gain=True)
        assert colormap is GAIN_COLORS
        assert colormap(norm(0.0)) == GAIN_COLORS(0.5)
        assert norm.vmin == -norm.vmax
    colormap, norm = choose_colors([[5.0, 9.0]], is_gain=True)
    red, _, blue, _ = colormap(norm(5.0))
    assert blue > red + 0.3


def test_a_linear_scale_is_kept_where_no_panel_would_fade() -> None:
    assert not isinstance(choose_colors([[8.0], [2.0]], is_gain=True)[1], FuncNorm)
    assert isinstance(choose_colors([[8.1], [2.0]], is_gain=True)[1], FuncNorm)


def test_scores_without_a_start_span_their_own_range(tmp_path: Path) -> None:
    table = build_table(tmp_path)
    figure = heat_map(table[table["role"] == "cell"], "accuracy")
    (mesh,) = list_meshes(figure)
    assert mesh.cmap is SCORE_COLORS and (mesh.norm.vmin, mesh.norm.vmax) == (36, 70)
    assert find_color_bar(figure).get_xlabel() == "accuracy (%)"


def test_a_map_of_gains_and_one_of_scores_have_a_colour_bar_each(tmp_path: Path) -> None:
    table = build_table(tmp_path, student=["small", "base"])
    table.loc[(table["role"] == "start") & (table["student"] == "base"), "value"] = float("nan")
    figure = heat_map(table, "accuracy")
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert labels == ["gain in accuracy (points)", "accuracy (%)"]
    check_page(figure)


def test_panels_tell_their_seeds_and_intervals_in_small_type(tmp_path: Path) -> None:
    table = build_table(tmp_path, seed=[0, 1, 2])
    for draw, note in (
        (heat_map, "3 seeds, 95 %: ±2.5 over seeds"),  # scores 0, 1, 2 apart: 4.303 / sqrt(3)
        (curves, "3 seeds, 95 % over seeds"),
    ):
        (text,) = [text for text in draw(table, "accuracy").axes[0].texts if text.get_label() == SUBTITLE]
        assert text.get_text().replace("\n", " ").endswith(note)
        assert text.get_fontsize() == 7
    paper = curves(load_paper_table("8"), "accuracy").axes[0]
    assert "as printed in the paper" in [text.get_text() for text in paper.texts]


def test_start_and_teacher_are_labelled_lines_whose_names_do_not_overlap(tmp_path: Path) -> None:
    for start in (30.0, 94.0, 95.0, 96.0):
        table = build_table(tmp_path / str(start), start_score=start)
        figure = curves(table, "accuracy")
        figure.draw_without_rendering()
        (axes,) = figure.axes
        heights = [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert heights == [start, 95.0]
        names = [text for text in axes.texts if text.get_label() != SUBTITLE]
        first, second = (text.get_window_extent() for text in names)
        assert {text.get_text() for text in names} == {f"SFT student {start:.1f}", "teacher 95.0"}
        assert first.y1 <= second.y0 or second.y1 <= first.y0
