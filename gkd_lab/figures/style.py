"""Style of the figures: sizes of a LaTeX page, quiet ink, colours that the colour-blind tell apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb, to_rgba

from gkd_lab.tables.divergences import CellDivergence

TEXT_WIDTH, COLUMN_WIDTH = 5.5, 3.25
"""Inches: the text of a page of one column (ICLR, NeurIPS), and a column of a page of two (ICML, ACL)."""
SCREEN_DPI = 140
"""Dots per inch in a notebook, where small type is then about as large as the text around it."""
TITLE_SIZE, LABEL_SIZE, TICK_SIZE, SMALL_SIZE = 8.0, 7.5, 7.0, 7.0
"""Points, at the figure's own width: what stands in a paper beside text of 10 points."""

INK, MUTED, FAINT, PAPER = "#1f2430", "#5f6675", "#d8dce3", "#fefefe"
MISSING = "#eceef2"
BASELINE_BAR, GREY_LINE = "#b4bac4", "#4d4d4d"
THEME_NAMES = {
    INK: "ink",
    MUTED: "muted",
    FAINT: "faint",
    PAPER: "paper",
    MISSING: "void",
    BASELINE_BAR: "bar",
    GREY_LINE: "line",
}
"""Colours that a page replaces by its own, so that a figure follows its light or dark theme."""

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
    "reward": GREY_LINE,
    "uld": "#b2182b",
}
_OTHER_COLOR = "#4d7a00"
MARKERS = "osD^vP*X"
LINE_COLORS = ("#8c8c8c", "#56b4e9", "#009e73", "#e69f00", "#0072b2", "#c8500a")
"""Colours of lines that are neither divergences nor methods."""
METHOD_COLORS = {
    "sft": GREY_LINE,
    "seqkd": "#cc79a7",
    "supervised_kd": "#56b4e9",
    "f_distill": "#009e73",
    "gkd_supervised": "#e69f00",
    "imitkd": "#7a6a00",
    "gkd": "#0072b2",
}
"""A method's colour, the same in all figures."""
GAIN_COLORS = LinearSegmentedColormap.from_list(
    "losses_and_gains", ["#8f3200", "#e08a3c", "#f6f6f4", "#74abd6", "#08457e"]
)
"""Gains and losses: orange below 0, near white at 0, blue above; told apart without red or green."""
SCORE_COLORS: Colormap = mpl.colormaps["cividis"]
"""Scores, which have no 0 to diverge from."""

_RC_PARAMS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": LABEL_SIZE,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": TITLE_SIZE,
    "axes.titleweight": "bold",
    "axes.labelsize": LABEL_SIZE,
    "axes.linewidth": 0.7,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": TICK_SIZE,
    "ytick.labelsize": TICK_SIZE,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.2,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "hatch.color": FAINT,
    "hatch.linewidth": 0.6,
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


def compute_contrast(first: Any, second: Any) -> float:
    """Return the contrast ratio of two colours by WCAG 2: 1 if they are equal, 21 for black on white."""
    dark, light = sorted(_compute_luminance(color) for color in (first, second))
    return (light + 0.05) / (dark + 0.05)


def choose_text_color(background: Any) -> str:
    """Return `#000000` or `#ffffff`, whichever contrasts more with the background; at least by 4.5."""
    return max("#000000", "#ffffff", key=lambda color: compute_contrast(color, background))


def _compute_luminance(color: Any) -> float:
    """Return the relative luminance of a colour by WCAG 2, 0 to 1."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
