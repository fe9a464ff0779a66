"""docs/gallery.md shows the lines by which analysis/figures.py draws its pictures."""

import re
from pathlib import Path

from gkd_lab import figures

ROOT = Path(__file__).parents[1]
GALLERY = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_each_picture_is_drawn_by_the_lines_above_it() -> None:
    source = (ROOT / "analysis" / "figures.py").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in re.findall(r"(?:^    [^\n]+\n)+", GALLERY, re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block if line and "import" not in line]
    assert len(lines) == 15
    assert [line for line in lines if line not in source] == []
    pictures = re.findall(r"!\[[^]]+\]\(img/gallery_(\w+)\.png\)", GALLERY)
    calls = [line.split("(")[0] for line in lines if " = " not in line.split("(")[0]]
    assert pictures == calls
    assert all((ROOT / "docs" / "img" / f"gallery_{name}.png").is_file() for name in pictures)


def test_every_public_figure_is_in_the_gallery() -> None:
    for name in figures.__all__:
        assert f"{name}(" in GALLERY or f"{name}`" in GALLERY, name
