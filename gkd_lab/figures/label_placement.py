"""Labels of points that hide neither each other nor another point."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from gkd_lab.figures.style import INK, MUTED, SMALL_SIZE

_POINT_RADIUS, _GAP = 4.0, 1.5
"""Points: half a marker, and the space between boxes."""
_DIRECTIONS = 16
_MAX_RINGS = 60
_LINE_FROM = 7.0
"""Points from a label's box to its point from which a line leads there."""


@dataclass(frozen=True)
class LabelledPoint:
    """A point in data coordinates, with the ends of its intervals, and its label."""

    x: float
    y: float
    text: str
    low: tuple[float, float]
    """(x, y) of the lower ends of its intervals."""
    high: tuple[float, float]


def place_labels(axes: Axes, points: Sequence[LabelledPoint]) -> None:
    """Write the label of each point beside it, where it overlaps no other label and no point.

    Also clear of the intervals of all points, if there is such a place within the axes. A label away from its
    point is led to it by a line. Places are final: the layout of the figure is made first, and limits must
    not change afterwards. A label without a place within the axes stands right of them.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    area = Bbox(axes.get_window_extent().get_points() * scale)
    positions = axes.transData.transform([(point.x, point.y) for point in points]) * scale
    markers = [_build_box(x, y, 2 * _POINT_RADIUS, 2 * _POINT_RADIUS) for x, y in positions]
    intervals = [box for point in points for box in _list_intervals(axes, point, scale)]
    placed: list[Bbox] = []
    for number in sorted(range(len(points)), key=lambda number: tuple(positions[number])):
        width, height = _measure_text(axes, points[number].text, scale)
        center = positions[number]
        candidates = list(_list_candidates(center, width, height, area))
        box = _choose_box(candidates, [*placed, *markers], intervals)
        if box is None:  # beside the axes, each below the last
            bottom = min([other.y0 for other in placed if other.x0 >= area.x1], default=area.y1)
            box = _build_box(area.x1 + _GAP + width / 2, bottom - _GAP - height / 2, width, height)
        placed.append(box)
        _write_label(axes, points[number], box, center)


def _measure_text(axes: Axes, text: str, scale: float) -> tuple[float, float]:
    """Return (width, height) of a label in points."""
    artist = axes.text(0, 0, text, fontsize=SMALL_SIZE)
    extent = artist.get_window_extent()
    artist.remove()
    return extent.width * scale, extent.height * scale


def _list_intervals(axes: Axes, point: LabelledPoint, scale: float) -> list[Bbox]:
    """Return the boxes in points of a point's horizontal and vertical interval."""
    left, right = axes.transData.transform([(point.low[0], point.y), (point.high[0], point.y)]) * scale
    bottom, top = axes.transData.transform([(point.x, point.low[1]), (point.x, point.high[1])]) * scale
    return [Bbox([left - 0.5, right + 0.5]), Bbox([bottom - 0.5, top + 0.5])]


def _build_box(x: float, y: float, width: float, height: float) -> Bbox:
    """Return the box of a width and height around a centre."""
    return Bbox([[x - width / 2, y - height / 2], [x + width / 2, y + height / 2]])


def _list_candidates(
    center: "np.ndarray[tuple[int], np.dtype[np.float64]]", width: float, height: float, area: Bbox
) -> Iterator[Bbox]:
    """Yield boxes within the area around a point, the nearest first: right, left, above, below, between."""
    order = sorted(range(_DIRECTIONS), key=lambda n: (n % (_DIRECTIONS // 4) != 0, n))
    for ring in range(_MAX_RINGS):
        distance = _POINT_RADIUS + _GAP + 4.0 * ring
        for number in order:
            angle = 2 * np.pi * number / _DIRECTIONS
            x = center[0] + np.cos(angle) * (distance + width / 2)
            y = center[1] + np.sin(angle) * (distance + height / 2)
            box = _build_box(x, y, width, height)
            if area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1:
                yield box


def _choose_box(candidates: Sequence[Bbox], taken: Sequence[Bbox], crossed: Sequence[Bbox]) -> Bbox | None:
    """Return the first box clear of both, else of the taken ones alone; None without one."""
    free = [box for box in candidates if not _overlaps_any(box, taken)]
    return next((box for box in free if not _overlaps_any(box, crossed)), free[0] if free else None)


def _overlaps_any(box: Bbox, others: Sequence[Bbox]) -> bool:
    """Return whether a box with a gap around it overlaps one of the others."""
    return any(
        box.x0 - _GAP < other.x1
        and other.x0 < box.x1 + _GAP
        and box.y0 - _GAP < other.y1
        and other.y0 < box.y1 + _GAP
        for other in others
    )


def _write_label(
    axes: Axes,
    point: LabelledPoint,
    box: Bbox,
    center: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> None:
    """Write a label into its box, with a line to its point where the box is not beside it."""
    nearest = np.clip(center, box.min, box.max)
    is_apart = float(np.hypot(*(nearest - center))) > _LINE_FROM + _POINT_RADIUS
    axes.annotate(
        point.text,
        (point.x, point.y),
        ((box.x0 + box.x1) / 2 - center[0], (box.y0 + box.y1) / 2 - center[1]),
        textcoords="offset points",
        ha="center",
        va="center",
        color=INK,
        fontsize=SMALL_SIZE,
        arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
        if is_apart
        else None,
        annotation_clip=False,
    ).set_in_layout(False)
