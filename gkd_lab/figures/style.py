"""Style of the figures: quiet ink, colours that the colour-blind tell apart, inline SVG."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import LinearSegmentedColormap, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from gkd_lab.tables.divergences import CellDivergence

INK, MUTED, FAINT, PAPER = "#1f2430", "#697080", "#d8dce3", "#fefefe"
MISSING = "#eceef2"
_THEME_NAMES = {INK: "ink", MUTED: "muted", FAINT: "faint", PAPER: "paper", MISSING: "void"}

# Okabe and Ito's blue, sky, grey, orange and vermilion: ordered from forward to reverse KL.
_DIVERGENCE_COLORS = LinearSegmentedColormap.from_list(
    "divergences",
    [(0, "#0072b2"), (0.1, "#56b4e9"), (0.5, "#8c8c8c"), (0.9, "#e69f00"), (1, "#c8500a")],
)
_COLORS_WITHOUT_BETA = {
    "tv": "#009e73",  # Okabe and Ito's green
    "cross_entropy": "#cc79a7",  # and reddish purple
    "squared_error": "#7a6a00",
    "hidden_states": "#5e3c99",
    "attentions": "#117a8b",
    "adversarial": "#7f4f24",
    "reward": "#4d4d4d",
    "uld": "#b2182b",
}
_OTHER_COLOR = "#4d7a00"
MARKERS = "osD^vP*X"
LINE_COLORS = ("#8c8c8c", "#56b4e9", "#009e73", "#e69f00", "#0072b2", "#c8500a")
"""Colours of lines that are no divergences."""
GAIN_COLORS = LinearSegmentedColormap.from_list("gains", ["#eef4fa", "#8db8dc", "#2f78b5", "#08306b"])
SIGNED_COLORS = LinearSegmentedColormap.from_list(
    "losses_and_gains", ["#a63c06", "#f0a868", "#f6f6f4", "#7fb2d9", "#08457e"]
)

_RC_PARAMS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "hatch.color": FAINT,
    "hatch.linewidth": 0.8,
}


@contextmanager
def apply_style() -> Iterator[None]:
    """Apply this package's matplotlib settings to figures drawn inside the `with` block."""
    with mpl.rc_context(_RC_PARAMS):
        yield


def get_divergence_color(divergence: CellDivergence) -> tuple[float, float, float, float]:
    """Return the RGBA colour of a divergence, or of a loss term that is none, equal in all figures."""
    if divergence.beta is None:
        return to_rgba(_COLORS_WITHOUT_BETA.get(divergence.kind or "", _OTHER_COLOR))
    return _DIVERGENCE_COLORS(float(divergence.beta))


def choose_text_color(color: tuple[float, float, float, float] | str) -> str:
    """Return `#000000` or `#ffffff`, whichever contrasts more with the background `color`.

    By WCAG 2's relative luminance.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if (1.05 / (luminance + 0.05)) > (luminance + 0.05) / 0.05 else "#000000"


def render_inline_svg(figure: Figure, name: str, label: str) -> str:
    """Render a figure as an `<svg>` element: text stays text, colours are the page's variables.

    Ids are prefixed with `name`, so that figures of one page do not borrow each other's clip paths.
    The page defines --ink, --muted, --faint, --paper and --void.
    """
    buffer = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _draw_only_once(figure):
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'\b(fill|stroke)="(#[0-9a-f]{6})"', r'style="\1: \2"', svg)
    svg = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _replace_theme_color, svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_escape_attribute(label)}"', 1)


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
    role = _THEME_NAMES.get(match[2])
    return f"{match[1]}: var(--{role})" if role else match[0]


def _escape_attribute(text: str) -> str:
    """Escape `&`, `"` and `<` of a text for an attribute in double quotes."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
