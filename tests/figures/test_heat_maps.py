"""Heat maps, curves and SVGs, compared with the table by the texts and lines that they draw."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkd_lab.config import ConfigError
from gkd_lab.config.loss_registry import LOSSES
from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.figures import curves, heat_map, loss_curves
from gkd_lab.figures.inline_svg import render_inline_svg
from gkd_lab.figures.style import choose_text_color, get_divergence_color
from gkd_lab.store import Store
from gkd_lab.tables.divergences import CellDivergence
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.loss_labels import divergence_label

from ..tables.synthetic_store import build_grid, fill_store

draw_axes = Axes.draw


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def read_squares(figure: Figure, panel: int = 0) -> dict[tuple[int, int], str]:
    """Map (column, row from below) to the text in the square."""
    axes = figure.axes[panel]
    return {
        (round(text.get_position()[0]), round(text.get_position()[1])): text.get_text()
        for text in axes.texts
        if text.get_ha() == "center"
    }


def list_panels(figure: Figure) -> list[Axes]:
    """Return the axes of the panels: neither a colour bar nor a place that is left blank."""
    return [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]


def read_tick_labels(axes: Axes) -> list[str]:
    """Return the labels below the columns in one line each."""
    return [" ".join(label.get_text().split()) for label in axes.get_xticklabels()]


def join_texts(figure: Figure) -> str:
    """Join all texts of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_the_heat_map_shows_improvements_with_lmbda_upwards_and_forward_kl_first(
    store: Store,
) -> None:
    grid = build_grid()
    fill_store(grid, store)
    figure = heat_map(build_long_table(grid, store), "accuracy")
    axes = figure.axes[0]
    assert read_tick_labels(axes) == [
        "Forward KL",
        "JSD(0.1)",
        "Reverse KL",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.5", "1"]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # the last row, lmbda 1, is on top
    squares = read_squares(figure)
    assert squares[0, 0] == "+10.0"  # 40 - 30
    assert squares[0, 2] == "+40.0"
    assert squares[2, 1] == "+21.0"  # 30 + 30 * 0.5 - 4 + 10 - 30 = 51 - 30
    bold = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert bold == ["+40.0"]
    assert "SFT student (30.0)" in join_texts(figure)
    assert "teacher 95.0" in join_texts(figure)


def test_negative_gains_have_a_true_minus_sign(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, start_score=60.0)
    assert read_squares(heat_map(build_long_table(grid, store), "accuracy"))[0, 0] == "\N{MINUS SIGN}20.0"


def test_small_gains_have_two_decimals(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    frame["value"] = 30 + (frame["value"] - 30) / 37
    assert read_squares(heat_map(frame, "accuracy"))[0, 0] == "+0.27"
    frame["value"] = (10 * frame["value"]).round() / 10
    assert read_squares(heat_map(frame, "accuracy"))[0, 0] == "+0.3"


def test_missing_and_failed_cells_are_named_in_their_squares(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[2:])
    store.get_record(grid.cells[1]).mark_failed("ValueError: broken")
    figure = heat_map(build_long_table(grid, store), "accuracy")
    squares = read_squares(figure)
    assert (squares[0, 0], squares[1, 0]) == ("missing", "failed")
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().mask.sum() == 2
    assert figure.axes[0].patch.get_hatch()


def test_the_heat_map_shows_scores_where_the_sft_student_is_missing(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    figure = heat_map(frame[frame["role"] == "cell"], "accuracy")
    assert read_squares(figure)[0, 0] == "40.0"
    assert "SFT student is missing" in join_texts(figure)


def test_a_square_shows_the_mean_and_number_of_its_seeds(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "seed": [0, 1, 2]})
    fill_store(grid, store, cells=grid.cells[:5])
    squares = read_squares(heat_map(build_long_table(grid, store), "accuracy"))
    assert squares[0, 0] == "+9.0"  # 38 + (0 + 1 + 2) / 3 - 30
    assert squares[0, 1] == "+38.5\n2 of 3"


def test_a_gain_is_over_the_start_of_the_cells_own_seed(store: Store) -> None:
    """Scores 68 and 69, starts 30 and 40: +38 and +29. A start without its cell does not count."""
    student = {"layers": 1, "width": 8, "heads": 2, "init_seed": "cell", "sft": {"steps": 4}}
    grid = build_grid(student=student, grid={"lmbda": [0, 1], "seed": [0, 1]})
    fill_store(grid, store, cells=[grid.cells[0], *grid.cells[2:]])
    frame = build_long_table(grid, store)
    frame.loc[(frame["role"] == "start") & (frame["seed"] == 1), "value"] = 40.0
    figure = heat_map(frame, "accuracy")
    squares = read_squares(figure)
    assert squares[0, 1] == "+33.5" and squares[0, 0] == "+8.0\n1 of 2"
    assert "SFT student (35.0)" in join_texts(figure)


def test_each_task_and_each_value_of_another_axis_has_a_panel(store: Store) -> None:
    students = build_grid(grid={"lmbda": [0, 1], "student": ["small", "base"]})
    fill_store(students, store)
    figure = heat_map(build_long_table(students, store), "accuracy")
    titles = [axes.get_title(loc="left") for axes in list_panels(figure)]
    assert titles == ["arithmetic, student small", "arithmetic, student base"]

    tasks = build_grid(grid={"task": ["arithmetic", "translation"], "lmbda": [0, 1]})
    fill_store(tasks, store)
    frame = build_long_table(tasks, store)
    assert [a.get_title(loc="left") for a in list_panels(heat_map(frame, "bleu"))] == ["translation"]
    assert [a.get_title(loc="left") for a in curves(frame, "accuracy").axes] == ["arithmetic"]


def test_a_collapsed_cell_is_drawn_at_each_combination(store: Store) -> None:
    grid = build_grid(grid={"lmbda": [0, 1], "temperature": [0.5, 1.0]})
    fill_store(grid, store)
    figure = heat_map(build_long_table(grid, store), "accuracy")
    assert [read_squares(figure, panel)[0, 0] for panel in (0, 1)] == ["+8.0", "+8.0"]


def test_total_variation_is_a_column_after_reverse_kl(store: Store) -> None:
    grid = build_grid(grid={"divergence": ["tv", "jsd"], "lmbda": [0, 1], "beta": [0, 1]})
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    figure = heat_map(frame, "accuracy")
    assert [axes.get_title(loc="left") for axes in list_panels(figure)] == ["arithmetic"]
    columns = read_tick_labels(figure.axes[0])
    assert columns == ["Forward KL", "Reverse KL", "Total variation"]
    assert read_squares(figure)[2, 1] == "+39.0"  # 40 + 30 - 4 / 4 - 30
    figure_of_curves = curves(frame, "accuracy")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure_of_curves.axes[0].get_lines()}
    assert lines["Total variation"] == [39.0, 69.0]
    assert [text.get_text() for text in figure_of_curves.legends[0].get_texts()] == columns
    histories = loss_curves(grid, store).legends[0]
    assert [text.get_text() for text in histories.get_texts()] == columns


def test_two_kinds_without_beta_have_columns_lines_and_colours_of_their_own(store: Store) -> None:
    grid = build_grid(grid={"method": ["seqkd", "f_distill", "supervised_kd"]})
    fill_store(grid, store)
    frame = build_long_table(grid, store).drop(columns="method")
    columns = ["Forward KL", "Total variation", "Cross entropy"]
    figure = heat_map(frame, "accuracy")
    assert read_tick_labels(figure.axes[0]) == columns
    lines = [line for line in curves(frame, "accuracy").axes[0].get_lines() if line.get_label() in columns]
    assert [line.get_label() for line in lines] == columns
    assert len({line.get_color() for line in lines}) == 3


def test_an_unknown_metric_is_refused_with_the_scores(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'rouge'.*greedy/accuracy"):
        heat_map(build_long_table(build_grid(), store), "rouge")


def test_a_table_without_cells_is_refused(store: Store) -> None:
    frame = build_long_table(build_grid(), store)
    with pytest.raises(ValueError, match="no cell"):
        heat_map(frame[frame["role"] == "start"], "accuracy")


def test_curves_have_a_line_for_each_divergence_and_intervals(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    axes = curves(build_long_table(grid, store), "accuracy").axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"Forward KL", "JSD(0.1)", "Reverse KL"} <= set(lines)
    assert list(lines["Forward KL"].get_ydata()) == [40.0, 55.0, 70.0]
    bars = axes.collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(37, 43), (52, 58), (67, 73)]
    assert {"SFT student 30.0", "teacher 95.0"} <= {text.get_text() for text in axes.texts}


def test_loss_curves_have_a_panel_for_each_lmbda_and_a_line_for_each_cell(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[:5])
    figure = loss_curves(grid, store)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["λ = 0", "λ = 0.5", "λ = 1"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 2, 0]
    shares = loss_curves(grid, store, quantity="on_policy").axes[1].get_lines()[0]
    assert set(shares.get_ydata()) == {0.5}


def test_a_nan_loss_does_not_spoil_the_scale(store: Store) -> None:
    grid = build_grid()
    fill_store(grid, store)
    store.get_record(grid.cells[0]).log_row({"step": 550, "loss": float("nan")})
    axes = loss_curves(grid, store).axes[0]
    assert axes.get_yscale() == "log"
    assert 0 < axes.get_ylim()[0] < axes.get_ylim()[1] < 2


def test_a_grid_with_nothing_done_can_be_drawn(store: Store) -> None:
    grid = build_grid()
    frame = build_long_table(grid, store)
    assert set(read_squares(heat_map(frame, "accuracy")).values()) == {"missing"}
    assert not curves(frame, "accuracy").legends
    assert not loss_curves(grid, store).legends


def test_labels_are_the_papers_and_colours_differ() -> None:
    betas = [0, 0.1, 0.5, 0.9, 1.0]
    labels = ["Forward KL", "JSD(0.1)", "JSD(0.5)", "JSD(0.9)", "Reverse KL"]
    assert [divergence_label(beta) for beta in betas] == labels
    divergences = [CellDivergence("jsd", beta) for beta in betas]
    divergences += [CellDivergence(kind, None) for kind in (*NAMES_WITHOUT_BETA, *LOSSES)]
    assert len({get_divergence_color(divergence) for divergence in divergences}) == len(divergences)
    assert divergence_label(None) == "Unknown divergence"
    assert divergence_label(None, "tv") == "Total variation"
    assert divergence_label(0.5, "jsd") == "JSD(0.5)"
    assert divergence_label(None, "squared_error") == "Squared error"


def test_text_contrasts_with_its_background() -> None:
    assert choose_text_color("#08306b") == "#ffffff"
    assert choose_text_color("#eef4fa") == "#000000"


def test_svgs_of_one_page_share_no_id_and_make_no_request(store: Store) -> None:
    import re

    grid = build_grid()
    fill_store(grid, store, cells=grid.cells[1:])
    frame = build_long_table(grid, store)
    first, second = (render_inline_svg(heat_map(frame, "accuracy"), name, "a < b") for name in "ab")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', first))
    assert {a or b for a, b in references} <= ids[0]
    assert "http" not in first and "<style" not in first
    assert 'aria-label="a &lt; b"' in first
    assert "missing</text>" in first  # text stays text
    assert "var(--void)" in first and "#eceef2" not in first


@pytest.mark.parametrize("draw", [heat_map, curves])
def test_a_figure_drawn_once_is_the_one_that_savefig_draws_in_two_passes(
    draw: Callable[..., Figure], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = build_grid(grid={"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 1], "student": ["small", "base"]})
    fill_store(grid, store)
    frame = build_long_table(grid, store)
    draws: list[object] = []
    monkeypatch.setattr(Axes, "draw", lambda axes, renderer: draws.append(axes) or draw_axes(axes, renderer))
    figure = draw(frame, "accuracy")
    once = render_inline_svg(figure, "map", "label")
    assert len(draws) == len(figure.axes) >= 2
    monkeypatch.setattr("gkd_lab.figures.inline_svg._draw_only_once", nullcontext)
    assert render_inline_svg(draw(frame, "accuracy"), "map", "label") == once
    assert len(draws) == 3 * len(figure.axes)


def test_a_drawn_figure_can_be_saved_again(store: Store, tmp_path: Path) -> None:
    grid = build_grid()
    fill_store(grid, store)
    figure = heat_map(build_long_table(grid, store), "accuracy")
    first = render_inline_svg(figure, "map", "label")
    assert render_inline_svg(figure, "map", "label") == first
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
