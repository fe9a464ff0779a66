"""Every notebook runs from top to bottom on made-up records, and is committed without outputs."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gkd_lab.experiments import load
from gkd_lab.records import Store

from .results.made_store import fill

NOTEBOOKS = sorted((Path(__file__).parent.parent / "analysis").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    """Sources of the code cells, without magics."""
    notebook = nbformat.read(path, as_version=4)
    return [
        "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_figures(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(load(path.stem, outputs=tmp_path), Store(tmp_path))
    monkeypatch.setenv("GKD_LAB_OUTPUTS", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    drawn = [cell for cell in code_of(path) if cell.startswith(("heat_map", "curves", "losses"))]
    assert len(drawn) == 4
    assert sum("image/png" in data for data in shown) == len(drawn)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_short_cells_no_functions_and_no_outputs(path: Path) -> None:
    for source in code_of(path):
        assert len(source.splitlines()) <= 12
        assert not any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
            for node in ast.walk(ast.parse(source))
        )
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")


def test_there_is_a_notebook_for_the_quickstart() -> None:
    assert "quickstart" in [path.stem for path in NOTEBOOKS]
