"""Colours: contrast of text, in figures and on the report's page; what the colour-blind tell apart."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import Colormap, to_rgb

import gkd_lab.report
from gkd_lab.figures.style import (
    GAIN_COLORS,
    INK,
    METHOD_COLORS,
    MISSING,
    MUTED,
    PAPER,
    SCORE_COLORS,
    THEME_NAMES,
    choose_text_color,
    compute_contrast,
    get_divergence_color,
)
from gkd_lab.tables.divergences import CellDivergence

READABLE = 4.5
"""WCAG 2, level AA, for small text."""
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
COLOR_BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def linearize(color: object) -> np.ndarray:
    rgb = np.array(to_rgb(color))  # type: ignore[arg-type]
    return np.asarray(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4))


def compute_distance(first: object, second: object, blindness: str) -> float:
    """Return the distance in CIELAB of two colours as the colour-blind see them."""
    matrix = np.array(COLOR_BLINDNESS[blindness])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    labs = []
    for color in (first, second):
        xyz = to_xyz @ np.clip(matrix @ linearize(color), 0, 1) / [0.9505, 1.0, 1.089]
        x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        labs.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return float(np.linalg.norm(labs[0] - labs[1]))


def test_contrast_is_21_for_black_on_white_and_1_for_equal_colours() -> None:
    assert compute_contrast("#000000", "#ffffff") == pytest.approx(21)
    assert compute_contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WebAIM's checker
    assert compute_contrast("#123456", "#123456") == 1


@pytest.mark.parametrize("colormap", [GAIN_COLORS, SCORE_COLORS])
def test_text_is_readable_on_every_colour_of_a_map(colormap: Colormap) -> None:
    colors = [colormap(share) for share in np.linspace(0, 1, 513)]
    assert min(compute_contrast(choose_text_color(color), color) for color in colors) >= READABLE


def test_text_of_a_figure_is_readable_on_its_background() -> None:
    assert compute_contrast(INK, MISSING) >= READABLE
    assert min(compute_contrast(color, PAPER) for color in (INK, MUTED)) >= READABLE


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_of_the_report_is_readable_in_each_theme(theme: str) -> None:
    source = (Path(gkd_lab.report.__file__).parent / "report.html.j2").read_text()
    blocks = dict(
        zip(
            ("light", "dark", "print"),
            re.findall(r":root \{([^}]*--ink.*?)\}", source, re.DOTALL),
            strict=True,
        )
    )
    pairs = re.findall(r"--(\w+): (#\w+);", blocks[theme])
    colors = {
        name: f"#{''.join(2 * c for c in hexa[1:])}" if len(hexa) == 4 else hexa for name, hexa in pairs
    }
    for name in ("ink", "muted", "accent", "bad", "good"):
        assert compute_contrast(colors[name], colors["paper"]) >= READABLE, name
    assert compute_contrast(colors["ink"], colors["void"]) >= READABLE
    assert set(THEME_NAMES.values()) <= set(colors)
    assert compute_contrast(colors["ink"], colors["bar"]) >= READABLE  # an interval on its bar


@pytest.mark.parametrize("blindness", COLOR_BLINDNESS)
def test_the_colour_blind_tell_gains_from_losses_and_lines_from_each_other(blindness: str) -> None:
    for share in (0.1, 0.25, 0.5, 1.0):
        loss, gain = GAIN_COLORS(0.5 - share / 2), GAIN_COLORS(0.5 + share / 2)
        assert compute_distance(loss, gain, blindness) > 60 * min(share, 0.5)
    betas = [get_divergence_color(CellDivergence("jsd", beta)) for beta in (0, 0.1, 0.5, 0.9, 1)]
    for colors in (betas, list(METHOD_COLORS.values())):
        assert min(compute_distance(a, b, blindness) for a, b in combinations(colors, 2)) > 9
