"""The site of docs/: it builds without a warning, shows what it must, and loads nothing from elsewhere."""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import gkd_lab
from gkd_lab.cli.command_table import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "api.md")


def build_site(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(
        "material", reason="mkdocs-material is not installed: pip install -c constraints.txt -e '.[docs]'"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build_site(ROOT, folder)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


class Tags(HTMLParser):
    """The tags of a page: (name, attributes)."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def find_ids(page: Path) -> set[str | None]:
    return {attributes.get("id") for _, attributes in Tags(page).tags}


def test_the_api_page_shows_every_public_name(site: Path) -> None:
    public = {f"gkd_lab.{name}" for name in gkd_lab.__all__ if name != "__version__"}
    assert public <= find_ids(site / "api.html")


def test_the_navigation_has_every_page_of_docs() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\b(\w+\.md)\b", navigation)), "give it a line under `nav` in mkdocs.yml"


def test_the_api_page_names_every_public_name() -> None:
    named = re.findall(r"^::: gkd_lab\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted({*gkd_lab.__all__} - {"__version__"})


def test_the_commands_page_has_each_command_and_its_help(site: Path) -> None:
    page = site / "commands.html"
    assert {f"gkd-lab-{name}" for name in COMMANDS} <= find_ids(page)
    text = page.read_text()
    for option in ("--retry-failed", "--noise-from", "--teacher_model_name_or_path"):
        assert option in text


def test_every_notebook_is_a_page_with_its_pictures(site: Path) -> None:
    for path in (ROOT / "analysis").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        drawn = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
        page = site / "notebooks" / f"{path.stem}.html"
        shown = [page.parent / str(attributes["src"]) for tag, attributes in Tags(page).tags if tag == "img"]
        pictures = [base64.b64decode(data["image/png"]) for data in drawn if "image/png" in data]
        assert [picture.read_bytes() for picture in shown] == pictures


def test_a_figure_is_a_link_to_its_picture(site: Path) -> None:
    tags = Tags(site / "index.html").tags
    pictures = [
        (link[1].get("href"), tag[1].get("src"))
        for link, tag in itertools.pairwise(tags)
        if tag[0] == "img" and link[0] == "a"
    ]
    assert ("img/quickstart.png", "img/quickstart.png") in pictures


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag, attributes in Tags(page).tags:
            loaded = [attributes.get("src")] + [attributes.get("href")] * (tag == "link")
            assert not [url for url in loaded if url and re.match(r"(https?:)?//", url)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text()), sheet
    # Without a server, the search index is a script, and its worker is replaced by a frame.
    assert (site / "search" / "search_index.js").is_file()
    assert 'src="theme/iframe-worker.js"' in (site / "index.html").read_text()


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.stem)
def test_a_page_has_the_lists_tables_and_code_that_github_shows(path: Path, site: Path) -> None:
    page = site / f"{'index' if path.stem == 'README' else path.stem.lower()}.html"
    article = page.read_text().partition("<article")[2].partition("</article>")[0]
    github = MarkdownIt("commonmark").enable("table").render(path.read_text())
    for tag in ("<li", "<table", "<tr", "<td", "<pre", "<h2", "<h3", "<img"):
        assert len(re.findall(rf"{tag}[ >]", article)) == len(re.findall(rf"{tag}[ >]", github)), tag


@pytest.mark.slow
def test_a_dead_link_or_anchor_fails_the_build(tmp_path: Path) -> None:
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("gkd_lab", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "analysis").mkdir()
    for notebook in (ROOT / "analysis").glob("*.ipynb"):
        (tmp_path / "analysis" / notebook.name).write_text(
            '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        )
    with (tmp_path / "docs" / "data.md").open("a") as page:
        page.write("\n[a](usage.md#no-such-heading) [b](no_such_page.md) [c](/usage.md)\n")
    with (tmp_path / "README.md").open("a") as page:
        page.write("\n[d](docs/usage.md#nor-this) [e](docs/nor_this.md) [f](analysis)\n")
    result = build_site(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    for dead in (
        "no-such-heading",
        "no_such_page.md",
        "'/usage.md'",
        "nor-this",
        "nor_this.md",
        "'analysis'",
    ):
        assert dead in result.stderr
    assert result.stderr.count("WARNING") == 6
