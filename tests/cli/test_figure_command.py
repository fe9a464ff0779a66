"""`gkd-lab figures`: files, missing cells, wrong requests."""

from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.store import Store

from ..tables.synthetic_store import fill_store
from .command_runs import BLOCK, BLOCKED, RunCommand, python, write_experiment

FIGURES = ("heat-map", "curves", "training-loss")


def write_run(*, done: int) -> str:
    """Write an experiment of four cells, of which the first `done` have records, and return its file."""
    name = write_experiment("{description: made up, task: arithmetic, grid: {lmbda: [0, 1], beta: [0, 1]}}")
    grid, store = experiments.load(name), Store(Path("outputs"))
    fill_store(grid, store, cells=grid.cells[:done])
    return name


def test_every_figure_is_written_in_each_format_and_named(run_command: RunCommand) -> None:
    status, out, err = run_command("figures", write_run(done=4), "-o", "figs/new", "--format", "svg, pdf,pdf")
    assert (status, err) == (0, "")
    assert out.split() == [
        f"figs/new/mine-arithmetic-{figure}.{suffix}" for figure in FIGURES for suffix in ("pdf", "svg")
    ]
    assert sorted(map(str, Path("figs/new").iterdir())) == sorted(out.split())


def test_without_a_folder_figures_go_to_the_outputs(run_command: RunCommand) -> None:
    name = write_run(done=4)
    folder = f"outputs/figures/mine-nano-{experiments.load(name).fingerprint}"
    _, out, _ = run_command("figures", name)
    assert out.split() == [f"{folder}/mine-arithmetic-{figure}.pdf" for figure in FIGURES]


def test_missing_cells_are_drawn_as_missing_and_named(run_command: RunCommand) -> None:
    name = write_run(done=3)
    status, _, err = run_command("figures", name, "-o", "figs", "--format", "svg")
    assert status == 0
    assert err == "arithmetic: 1 of 4 cells have no score: λ = 1, Reverse KL, seed 0 (missing)\n"
    assert ">missing<" in Path("figs/mine-arithmetic-heat-map.svg").read_text()


def test_without_a_score_the_command_to_run_first_is_named(run_command: RunCommand) -> None:
    name = write_run(done=0)
    words = ["--outputs", "other", "--set", "steps=3"]
    status, out, err = run_command("figures", name, "-o", "figs", *words)
    assert (status, out) == (1, "")
    assert f"gkd-lab run {name} --set steps=3 --outputs other" in err
    assert not Path("figs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "pgn"], "unknown format 'pgn'; did you mean 'png'? valid: pdf, svg, png"),
        (["--format", ","], "unknown format ','; valid: pdf, svg, png"),
        (["--width", "0.2"], "--width 0.2: expected inches from 2.5 to 20"),
        (["--width", "nan"], "--width nan: expected inches from 2.5 to 20"),
        (["-o", "mine.yaml"], "-o 'mine.yaml': "),
        (["-o", "mine.yaml/figs"], "mine.yaml' is a file; expected a folder"),
        (["-o", "/proc/none"], "-o '/proc/none': cannot write there: "),
    ],
)
def test_a_wrong_request_gives_one_message_and_exit_status_2(
    words: list[str], message: str, run_command: RunCommand
) -> None:
    status, out, err = run_command("figures", write_run(done=1), *words)
    assert (status, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_figures_are_written_without_training_libraries(run_command: RunCommand) -> None:
    name = write_run(done=4)
    done = python(BLOCK, ",".join(BLOCKED), "figures", name, "-o", "figs", "--width", "3.25")
    assert done.returncode == 0, done.stderr
    assert len(list(Path("figs").iterdir())) == 3
