"""mkdocs hooks: pages that are made from files outside docs/, and links that hold on GitHub and in the site.

README, changelog and notebooks are pages where they stand in the repository; the site places them beside the
files of docs/ and changes their links to match. The reference of the command line is made from its help.
"""

import os
import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from typer.testing import CliRunner

from gkd_lab.cli import app
from gkd_lab.cli.command_table import COMMAND_GROUPS

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Path in the repository -> path in the site."""
NOTEBOOKS = sorted(path.stem for path in (ROOT / "analysis").glob("*.ipynb"))
SOURCES = {site: path for path, site in PAGES.items()} | {
    f"notebooks/{name}.md": f"analysis/{name}.ipynb" for name in NOTEBOOKS
}
"""Path in the site -> path in the repository, where it is not the same below docs/."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[/#])([^)#\s]+)")
"""Target of a relative Markdown link or image, without its anchor."""
FIGURE = re.compile(r'<p>(<img [^>]*?src="([^"]+)"[^>]*>)</p>')
"""A paragraph with a picture and nothing else."""
PICTURE = re.compile(r"output_(\d+)_(\d+)\.png")
"""Name that nbconvert gives a picture: numbers of its cell and output."""
COMMANDS = """# Command line

The help of every command. [Usage](usage.md) goes by task, [invalid input](bad_input.md) has the messages.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the notebooks in the navigation."""
    for section in config.nav or []:
        if "Notebooks" in section:
            section["Notebooks"] = [f"notebooks/{name}.md" for name in NOTEBOOKS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "commands.md", content=describe_commands()))
    for name in NOTEBOOKS:
        for uri, content in convert_notebook(name).items():
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link at the page or file that the site has for its target in the repository."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def relocate(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        site_target = locate_target(target)
        if site_target is None:
            return match[1]
        if files.get_file_from_path(site_target) is None:
            files.append(File.generated(config, site_target, abs_src_path=str(ROOT / target)))
        return os.path.relpath(site_target, posixpath.dirname(uri) or ".")

    return LINK.sub(relocate, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make each figure a link to its picture, to see a wide one whole on a narrow screen."""
    return FIGURE.sub(r'<p><a href="\2">\1</a></p>', html)


def locate_target(path: str) -> str | None:
    """Return where the site has a file of the repository; None: it has no such file."""
    if path in PAGES:
        return PAGES[path]
    if not (ROOT / path).is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("analysis/") and path.endswith(".ipynb"):
        return f"notebooks/{Path(path).stem}.md"
    return f"files/{path}"


def describe_commands() -> str:
    """Return the reference of `gkd-lab` as Markdown: the help of each command, by group."""
    parts = [COMMANDS, read_help()]
    for title, group in COMMAND_GROUPS.items():
        parts.append(f"## {title}\n")
        for name, entry in group.items():
            parts.append(f"### `gkd-lab {name}`\n\n{entry.short_help}\n\n{read_help(name)}")
    return "\n".join(parts)


def read_help(*command: str) -> str:
    """Return what `gkd-lab COMMAND --help` prints as a block of Markdown."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="gkd-lab", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return f"```text\n{result.stdout.rstrip()}\n```\n"


def convert_notebook(name: str) -> dict[str, str | bytes]:
    """Return the page of a notebook and its pictures, by their paths in the site."""
    notebook = nbformat.read(ROOT / "analysis" / f"{name}.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # colours
    markdown, resources = MarkdownExporter().from_notebook_node(notebook)
    # Without pandas' classes a table looks, and scrolls, like the others of the site.
    markdown = markdown.replace('<table border="1" class="dataframe">', "<table>")
    pages: dict[str, str | bytes] = {}
    for picture, data in resources["outputs"].items():
        cell, output = map(int, PICTURE.fullmatch(picture).groups())
        width = notebook.cells[cell].outputs[output].metadata.get("image/png", {}).get("width")
        size = f"{{width={width}}}" if width else ""
        markdown = markdown.replace(f"![png]({picture})", f"![Figure]({name}-{picture}){size}")
        pages[f"notebooks/{name}-{picture}"] = data
    return {f"notebooks/{name}.md": markdown, **pages}
