"""Every notebook runs from top to bottom, on made-up records or on made-up tables."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from gkd_lab import experiments
from gkd_lab.experiments import load
from gkd_lab.store import Store
from gkd_lab.tables.table import encode_table, table
from gkd_lab.tasks import TASKS

from .tables.synthetic_store import fill_store

NOTEBOOKS = sorted((Path(__file__).parent.parent / "analysis").glob("*.ipynb"))
OF_PAPER = [path for path in NOTEBOOKS if path.stem != "quickstart"]
FIGURE = re.compile(r"^(bars|curves|heat_map|lines|loss_curves|reward_gains|tradeoff)\(", re.MULTILINE)


def code_of(path: Path) -> list[str]:
    """Sources of the code cells, without magics."""
    notebook = nbformat.read(path, as_version=4)
    return [
        "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def made_table(name: str, outputs: Path) -> pd.DataFrame:
    """The table of an experiment, all done: more text of the student's own is better, seeds differ."""
    frame = table(load(name, outputs=outputs), Store(outputs))
    fixed = frame["role"].map({"start": 40.0, "teacher": 95.0})
    score = fixed.fillna(
        60 + 9 * frame["lmbda"] - frame["beta"].fillna(0.3) + 0.4 * frame["seed"].astype(float)
    )
    more = ("self_bleu", "rouge2") if name == "rl_tradeoff" else ("self_bleu",)
    metrics = frame["task"].map(lambda task: (*TASKS[task].metrics, *more))
    for column in (one for one in frame if frame[one].isna().all() and one not in ("stands_for", "error")):
        metric, _, bound = column.rsplit("/", 1)[-1].partition(".")
        measured = metrics.map(lambda names, metric=metric: metric in names)
        frame[column] = (score + {"": 0, "low": -2, "high": 2}[bound]).where(measured)
    return frame.assign(status="done")


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(cells: list[nbformat.NotebookNode], kind: str) -> list[str]:
    """What cells gave as their value in one form, and what they printed."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "stream":
        return [output.text for output in outputs if output.output_type == "stream"]
    values = [output.data for output in outputs if output.output_type == "execute_result"]
    return [data[kind] for data in values if kind in data]


def test_the_quickstart_runs_and_shows_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = set(NOTEBOOKS) - set(OF_PAPER)
    fill_store(load(path.stem, outputs=tmp_path), Store(tmp_path))
    monkeypatch.setenv("GKD_LAB_OUTPUTS", str(tmp_path))
    notebook = executed(nbformat.read(path, as_version=4), tmp_path)
    assert len(shown(notebook.cells, "image/png")) == 4 == len(FIGURE.findall("\n".join(code_of(path))))


def test_the_paper_s_notebooks_run_and_show_their_figures_and_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel for all, emptied before each."""
    monkeypatch.setenv("GKD_LAB_TABLES", str(tmp_path))
    notebooks = [nbformat.read(path, as_version=4) for path in OF_PAPER]
    joined = nbformat.v4.new_notebook(metadata=notebooks[0].metadata)
    for path, notebook in zip(OF_PAPER, notebooks, strict=True):
        (tmp_path / f"{path.stem}.parquet").write_bytes(
            encode_table(made_table(path.stem, tmp_path), "parquet")
        )
        joined.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    executed(joined, tmp_path)
    for path, notebook in zip(OF_PAPER, notebooks, strict=True):
        figures = FIGURE.findall("\n".join(code_of(path)))
        assert len(shown(notebook.cells, "image/png")) == len(figures) > 0, path.stem
        printed = "".join(shown(notebook.cells, "stream"))
        claims = experiments.outline_experiment(path.stem)[0].paper.claims
        assert re.findall(r"^(C\d+b?) ", printed, re.MULTILINE) == list(claims), path.stem
        assert printed.count("The paper's own numbers:") == len(claims)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_short_cells_and_defines_nothing(path: Path) -> None:
    for source in code_of(path):
        assert len(source.splitlines()) <= 12
        assert not any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
            for node in ast.walk(ast.parse(source))
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_it_uses(path: Path) -> None:
    tree = ast.parse("\n".join(code_of(path)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_hold_no_error_and_no_place_on_a_machine(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_every_figure_of_the_paper_that_is_an_experiment_has_one_and_a_notebook() -> None:
    found = {
        name: set(experiments.outline_experiment(name)[0].paper.figures)
        for name in experiments.list_experiment_files()
    }
    figures = {*"123456789", *(f"A.{number}" for number in range(10, 16))}
    assert set().union(*found.values()) == figures
    assert {path.stem for path in NOTEBOOKS} == {name for name in found if not name.startswith("nano_")}
