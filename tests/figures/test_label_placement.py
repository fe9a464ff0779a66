"""Labels of points: bounding boxes that do not overlap, and lines to points that are far away."""

import random
from itertools import combinations

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from gkd_lab.figures.label_placement import LabelledPoint, place_labels


def draw_points(positions: list[tuple[float, float]], half_interval: float = 0.0) -> Axes:
    """Draw points with labels like those of alphas on axes from 0 to 1, and place the labels."""
    figure = Figure(figsize=(2.7, 2.6), layout="constrained")
    axes = figure.subplots()
    for x, y in positions:
        axes.plot(x, y, "o", ms=5)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    points = [
        LabelledPoint(
            x, y, f"α = 0.{number:02d}",
            (x - half_interval, y - half_interval), (x + half_interval, y + half_interval),
        )
        for number, (x, y) in enumerate(positions)
    ]  # fmt: skip
    place_labels(axes, points)
    figure.draw_without_rendering()
    return axes


def get_box(text: object) -> Bbox:
    """Return the box of a label's text alone, without the line to its point."""
    from matplotlib.text import Text

    return Text.get_window_extent(text)  # type: ignore[arg-type]


def overlaps(a: Bbox, b: Bbox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def check_no_overlap(axes: Axes) -> None:
    boxes = [get_box(text) for text in axes.texts]
    assert not [pair for pair in combinations(boxes, 2) if overlaps(*pair)]
    radius = 2.5 * axes.figure.dpi / 72
    for line in axes.get_lines():
        x, y = axes.transData.transform(line.get_xydata()[0])
        marker = Bbox([[x - radius, y - radius], [x + radius, y + radius]])
        assert not any(overlaps(marker, box) for box in boxes)


@pytest.mark.parametrize("seed", range(12))
def test_labels_of_a_cluster_overlap_neither_each_other_nor_a_point(seed: int) -> None:
    generator = random.Random(seed)
    spread = generator.choice([0.001, 0.02, 0.2, 0.8])
    count = generator.randint(2, 14)
    positions = [(0.5 + spread * (generator.random() - 0.5), 0.5 + spread * (generator.random() - 0.5))
                 for _ in range(count)]  # fmt: skip
    axes = draw_points(positions, half_interval=0.1)
    assert len(axes.texts) == count
    check_no_overlap(axes)


def test_labels_that_find_no_place_within_the_axes_stand_beside_them() -> None:
    axes = draw_points([(0.5, 0.5)] * 90)
    check_no_overlap(axes)
    area = axes.get_window_extent()
    assert any(get_box(text).x0 >= area.x1 for text in axes.texts)


def test_a_point_by_itself_has_its_label_on_the_right_and_no_line() -> None:
    (text,) = draw_points([(0.5, 0.5)]).texts
    x, y = text.axes.transData.transform((0.5, 0.5))
    box = get_box(text)
    assert box.x0 > x and box.y0 < y < box.y1
    assert text.arrow_patch is None  # type: ignore[attr-defined]


def test_a_label_at_the_right_edge_moves_to_the_left() -> None:
    (text,) = draw_points([(0.98, 0.5)]).texts
    assert get_box(text).x1 < text.axes.transData.transform((0.98, 0.5))[0]


def test_labels_away_from_their_points_have_lines_and_avoid_intervals() -> None:
    axes = draw_points([(0.5, 0.5), (0.505, 0.5), (0.51, 0.5), (0.5, 0.505), (0.505, 0.51)])
    assert any(text.arrow_patch is not None for text in axes.texts)  # type: ignore[attr-defined]
    (text,) = draw_points([(0.5, 0.5)], half_interval=0.3).texts
    x, y = text.axes.transData.transform((0.5, 0.5))
    box = get_box(text)
    assert not (box.x0 < x < box.x1 or box.y0 < y < box.y1)
