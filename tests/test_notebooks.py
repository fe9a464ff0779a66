"""Each notebook runs on synthetic records or tables, and is short, clean and complete."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from gkd_lab import experiments
from gkd_lab.experiments import load
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.table import encode_table

from .tables.synthetic_store import fill_store

NOTEBOOKS = sorted((Path(__file__).parent.parent / "analysis").glob("*.ipynb"))
YOUR_OWN_FIGURE = Path(__file__).parent.parent / "analysis" / "your_own_figure.ipynb"
EXPERIMENT_NOTEBOOKS = [path for path in NOTEBOOKS if path != YOUR_OWN_FIGURE]
PAPER_NOTEBOOKS = [path for path in EXPERIMENT_NOTEBOOKS if path.stem != "quickstart"]
FIGURE = re.compile(
    r"^(bars|curves|heat_map|interquartile_means|lines|loss_curves|profiles|reward_gains|tradeoff)\(",
    re.MULTILINE,
)


def read_code_cells(path: Path) -> list[str]:
    """Return the sources of the code cells, without magics."""
    notebook = nbformat.read(path, as_version=4)
    return [
        "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def build_synthetic_table(name: str, outputs: Path) -> pd.DataFrame:
    """Build the finished table of an experiment: scores rise with lmbda and differ between seeds."""
    table = build_long_table(load(name, outputs=outputs), Store(outputs))
    reference_scores = table["role"].map({"start": 40.0, "teacher": 95.0})
    score = reference_scores.fillna(
        60 + 9 * table["lmbda"] - table["beta"].fillna(0.3) + 0.4 * table["seed"].astype(float)
    )
    return table.assign(value=score, low=score - 2, high=score + 2, status="done", evaluation_status="done")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def list_outputs(cells: list[nbformat.NotebookNode], kind: str) -> list[str]:
    """List the values of cells in one MIME type, or what they printed (`stream`)."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "stream":
        return [output.text for output in outputs if output.output_type == "stream"]
    values = [output.data for output in outputs if output.output_type in ("execute_result", "display_data")]
    return [data[kind] for data in values if kind in data]


def test_the_quickstart_notebook_runs_and_shows_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = set(EXPERIMENT_NOTEBOOKS) - set(PAPER_NOTEBOOKS)
    fill_store(load(path.stem, outputs=tmp_path), Store(tmp_path))
    monkeypatch.setenv("GKD_LAB_OUTPUTS", str(tmp_path))
    notebook = execute(nbformat.read(path, as_version=4), tmp_path)
    assert (
        len(list_outputs(notebook.cells, "image/png"))
        == 4
        == len(FIGURE.findall("\n".join(read_code_cells(path))))
    )


def test_your_own_figure_runs_on_the_committed_table(tmp_path: Path) -> None:
    """A folder beside an empty `outputs`, as `analysis` is in a fresh clone."""
    folder = tmp_path / "analysis"
    (folder / "tables").mkdir(parents=True)
    shutil.copy(YOUR_OWN_FIGURE.parent / "tables" / "rows.parquet", folder / "tables")
    stored = nbformat.read(YOUR_OWN_FIGURE, as_version=4)
    executed = execute(nbformat.read(YOUR_OWN_FIGURE, as_version=4), folder)
    for kind in ("image/png", "text/html", "stream"):
        assert len(list_outputs(executed.cells, kind)) == len(list_outputs(stored.cells, kind))
    assert len(list_outputs(executed.cells, "image/png")) == 3
    assert list_outputs(executed.cells, "text/html") == list_outputs(stored.cells, "text/html")


def test_your_own_figure_takes_a_complete_run_of_yours(tmp_path: Path) -> None:
    fill_store(load("rows", outputs=tmp_path / "outputs"), Store(tmp_path / "outputs"))
    folder = tmp_path / "analysis"
    folder.mkdir()
    executed = execute(nbformat.read(YOUR_OWN_FIGURE, as_version=4), folder)
    assert len(list_outputs(executed.cells, "image/png")) == 3
    _, gains, *_ = list_outputs(executed.cells, "text/html")
    mean_of_seeds = 40 + 30 * 0.5 + 212 - 30  # `linear_score` minus the start's
    assert f"<td>{mean_of_seeds:.1f}</td>" in gains


@pytest.mark.slow
def test_the_papers_notebooks_run_and_show_their_figures_and_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel runs all, reset before each."""
    monkeypatch.setenv("GKD_LAB_TABLES", str(tmp_path))
    notebooks = [nbformat.read(path, as_version=4) for path in PAPER_NOTEBOOKS]
    joined = nbformat.v4.new_notebook(metadata=notebooks[0].metadata)
    for path, notebook in zip(PAPER_NOTEBOOKS, notebooks, strict=True):
        (tmp_path / f"{path.stem}.parquet").write_bytes(
            encode_table(build_synthetic_table(path.stem, tmp_path), "parquet")
        )
        joined.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    execute(joined, tmp_path)
    for path, notebook in zip(PAPER_NOTEBOOKS, notebooks, strict=True):
        figures = FIGURE.findall("\n".join(read_code_cells(path)))
        assert len(list_outputs(notebook.cells, "image/png")) == len(figures) > 0, path.stem
        printed = "".join(list_outputs(notebook.cells, "stream"))
        claims = experiments.outline_experiment(path.stem)[0].paper.claims
        assert re.findall(r"^(C\d+b?) ", printed, re.MULTILINE) == list(claims), path.stem
        assert printed.count("The paper's own numbers:") == len(claims)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_short_cells_and_defines_nothing(path: Path) -> None:
    for source in read_code_cells(path):
        assert len(source.splitlines()) <= 12
        assert not any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
            for node in ast.walk(ast.parse(source))
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_all_its_imports(path: Path) -> None:
    tree = ast.parse("\n".join(read_code_cells(path)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_have_no_error_and_no_local_path(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_each_figure_of_the_paper_has_an_experiment_and_each_experiment_a_notebook() -> None:
    experiment_figures = {
        name: set(experiments.outline_experiment(name)[0].paper.figures)
        for name in experiments.list_experiment_files()
    }
    figures = {*"123456789", *(f"A.{number}" for number in range(10, 16))}
    assert set().union(*experiment_figures.values()) == figures
    assert {path.stem for path in EXPERIMENT_NOTEBOOKS} == {
        name for name in experiment_figures if not name.startswith("nano_")
    }
