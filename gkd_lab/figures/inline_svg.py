"""Figures as inline SVG of a page: an `<svg>` for each panel, so that a narrow page stacks them.

A figure is drawn once; its panels, colour bars and legends are cut out of that drawing.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox

from gkd_lab.figures.style import THEME_NAMES

MAX_SCALED_WIDTH = 250
"""Points: a wider piece keeps its size on a narrow screen and is moved sideways in its own box."""
_MARGIN = 2
"""Points around each piece."""

Piece = list[Axes | Legend]


def render_inline_svg(figure: Figure, name: str, label: str) -> str:
    """Render a figure as a `<div>` of `<svg>` pieces: text stays text, colours are the page's variables.

    Pieces are the panels (those of a row without labels of their own are one), then colour bars and legends.
    Each has its width in points as the variable `--w`, and one above `MAX_SCALED_WIDTH` is in a `<div
    class="scroll">`. The outer `<div>` has the class `panels` and one of `_choose_arrangement`. Ids are
    prefixed with `name`, so that figures of one page do not borrow each other's clip paths. The page defines
    the variables of `THEME_NAMES`.
    """
    buffer, pieces = StringIO(), _list_pieces(figure)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _draw_only_once(figure):
        figure.savefig(buffer, format="svg")
    drawing = ElementTree.fromstring(_rewrite_svg(buffer.getvalue(), name))
    groups = {group.get("id"): group for group in drawing.iter("g")}
    definitions = [element for element in drawing if element.tag == "defs"]
    svgs = []
    for piece in pieces:
        elements = [groups[f"{name}-{artist.get_gid()}"] for artist in piece]
        svgs.append(_format_svg([*elements, *definitions], _measure_piece(figure, piece)))
        definitions = []  # the pieces of a page share them
    panels = [piece for piece in pieces if isinstance(piece[0], Axes) and not _is_color_bar(piece[0])]
    start = f'<div class="panels {_choose_arrangement(len(panels))}" role="img" '
    return f'{start}aria-label="{_escape_attribute(label)}">{"".join(svgs)}</div>'


def _choose_arrangement(panels: int) -> str:
    """Return `one`, `two` or `three`: panels in a row of a wide page, so that few places are blank."""
    if panels <= 1:
        return "one"
    return "two" if panels == 2 or -panels % 2 < -panels % 3 else "three"


def _is_color_bar(axes: Axes) -> bool:
    """Return whether axes are a colour bar, or the place that holds some."""
    return axes.get_label() == "<colorbar>" or not axes.axison


def _list_pieces(figure: Figure) -> list[Piece]:
    """Give each axes and legend of a figure an id, and return those of each piece, in order."""
    pieces: list[Piece] = []
    for number, axes in enumerate(figure.axes):
        axes.set_gid(f"panel-{number}")
        has_labels = axes.get_subplotspec() is None or axes.yaxis.get_tick_params()["labelleft"]
        if not axes.axison and not axes.child_axes and not axes.get_legend():
            continue
        if pieces and axes.axison and not has_labels:
            pieces[-1].append(axes)
        else:
            pieces.append([axes])
    for number, legend in enumerate(figure.legends):
        legend.set_gid(f"legend-{number}")
        pieces.append([legend])
    return pieces


def _measure_piece(figure: Figure, piece: Piece) -> tuple[float, float, float, float]:
    """Return (left, top, width, height) of a piece in points, from the figure's top left corner."""
    boxes = [box for artist in piece for box in _list_boxes(artist)]
    left, bottom, right, top = (float(edge) * 72 / figure.dpi for edge in Bbox.union(boxes).extents)
    height = figure.get_figheight() * 72
    return left - _MARGIN, height - top - _MARGIN, right - left + 2 * _MARGIN, top - bottom + 2 * _MARGIN


def _list_boxes(artist: Artist) -> Iterator[Bbox]:
    """Yield the boxes in pixels of what an axes or a legend draws, texts apart from the layout too."""
    if isinstance(artist, Axes) and not artist.axison:
        for child in (*artist.child_axes, artist.get_legend()):
            yield from _list_boxes(child) if child is not None else ()
        return
    box = artist.get_tightbbox()
    if box is not None:
        yield box
    if isinstance(artist, Axes):
        yield from (text.get_window_extent() for text in artist.texts if text.get_text())


def _format_svg(elements: list[ElementTree.Element], box: tuple[float, float, float, float]) -> str:
    """Format elements as an `<svg>` that shows the box of a drawing in points."""
    content = "".join(ElementTree.tostring(element, encoding="unicode") for element in elements)
    view, width = " ".join(f"{number:.1f}" for number in box), box[2]
    svg = f'<svg viewBox="{view}" style="--w: {width:.0f}">{content}</svg>'
    return svg if width <= MAX_SCALED_WIDTH else f'<div class="scroll">{svg}</div>'


def _rewrite_svg(svg: str, name: str) -> str:
    """Return matplotlib's `<svg>` without metadata and namespaces, ids prefixed, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = _number_ids(svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'\b(fill|stroke)="(#[0-9a-f]{6})"', r'style="\1: \2"', svg)
    return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _replace_theme_color, svg)


def _number_ids(svg: str) -> str:
    """Return an SVG with numbers for matplotlib's hashes of clip paths, hatches and markers.

    They are hashes of coordinates, whose last bits change when a figure is laid out again.
    """
    ids = dict.fromkeys(re.findall(r'\bid="([hmp][0-9a-f]{10})"', svg))
    numbers = {hashed: f"{hashed[0]}{number}" for number, hashed in enumerate(ids)}
    return re.sub(r"\b[hmp][0-9a-f]{10}\b", lambda match: numbers.get(match[0], match[0]), svg)


@contextmanager
def _draw_only_once(figure: Figure) -> Iterator[None]:
    """Lay a figure out without drawing it while `savefig` still has a layout to make; then it draws it.

    `savefig` draws twice, first for the layout alone, which measures what it needs by itself.
    """
    draw = figure.draw

    def lay_out_or_draw(renderer: RendererBase) -> None:
        engine = figure.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine):
            engine.execute(figure)
        else:
            draw(renderer)

    figure.draw = lay_out_or_draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        del figure.draw  # the class has one


def _replace_theme_color(match: re.Match[str]) -> str:
    """Return a matched `fill: #...` with the page's variable for a theme colour, else unchanged."""
    role = THEME_NAMES.get(match[2])
    return f"{match[1]}: var(--{role})" if role else match[0]


def _escape_attribute(text: str) -> str:
    """Escape `&`, `"` and `<` of a text for an attribute in double quotes."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
