"""docs/tutorial.md is true: its commands run as written, in order, and make the cells and files it names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.cli.command_table import load_command
from gkd_lab.config import Grid
from gkd_lab.store import Store

from .tables.synthetic_store import fill_store

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
INSTALL, *SHELL_BLOCKS = [text for language, text in BLOCKS if language == "bash"]
COMMANDS = re.findall(r"^gkd-lab .*$", "".join([INSTALL, *SHELL_BLOCKS]), re.MULTILINE)
QUICKSTART = {"lmbda": "0,1", "beta": "0,0.5,1"}
FINGERPRINT = re.compile(r"^([0-9a-f]{8}) ", re.MULTILINE)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the reader's folder, with this environment's `gkd-lab` on the path."""
    command = tmp_path / "bin" / "gkd-lab"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gkd_lab "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "study"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run_shell(text: str) -> str:
    done = subprocess.run(["bash", "-e", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout + done.stderr


def load_quickstart() -> Grid:
    return experiments.load("quickstart", overrides=QUICKSTART)


def test_the_install_block_names_files_of_the_repository() -> None:
    assert all((ROOT / name).is_file() for name in re.findall(r"\.\./gkd_lab/(\S+)", INSTALL))
    assert "pip install -c ../gkd_lab/constraints.txt ../gkd_lab\n" in INSTALL


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_valid_call(command: str) -> None:
    _, name, *words = shlex.split(command)
    if name != "--version":
        context = load_command(name).make_context(name, words)  # raises UsageError for what it does not take
        assert context.args == [], "no command of the page takes further words"


def test_the_cells_of_the_page_are_those_of_its_experiments(study: Path) -> None:
    for block in SHELL_BLOCKS:
        if "<<'END'" in block:
            run_shell(block)
    grids = load_quickstart(), experiments.load("words.yaml")
    assert [len(grid.cells) for grid in grids] == [6, 27]
    outputs = [text for language, text in BLOCKS if language == "text"]
    shown = [set(digits) for digits in map(FINGERPRINT.findall, outputs) if digits]
    fingerprints = [{cell.fingerprint for cell in grid.cells} for grid in grids]
    assert shown[0] and shown[0] < fingerprints[0]
    assert shown[1] and shown[1] < fingerprints[1]
    assert set().union(*shown[2:]) <= fingerprints[1]
    five_seeds = experiments.load("words.yaml", overrides={"seed": "0,1,2,3,4"})
    assert f"the {len(five_seeds.cells) - 27} cells that are new" in TEXT


def list_shown_files() -> list[str]:
    """List the files that the page says to be written: those that `figures` prints."""
    printed = "".join(text for language, text in BLOCKS if language == "text")
    return [line for line in printed.splitlines() if "/words-" in line]


@pytest.mark.slow
def test_the_commands_run_in_order_and_write_the_figures(study: Path) -> None:
    """The quickstart is done before, with made-up scores; the words are trained."""
    fill_store(load_quickstart(), Store(Path("outputs")))
    outputs = [run_shell(block) for block in SHELL_BLOCKS]
    assert "quickstart: all 6 cells are done" in outputs[0]
    (report,) = re.findall(r"^report: (.*)$", outputs[0], re.MULTILINE)
    assert "<h1>quickstart</h1>" in Path(report).read_text(encoding="utf-8")
    assert "words: all 27 cells are done" in "".join(outputs)
    assert len(Path("words.csv").read_text().splitlines()) == 30
    assert "".join(outputs).count("On-policy data beats fixed data, whatever the divergence.") == 1
    assert outputs[-1].split() == list_shown_files()
    (figure,) = re.findall(r"\\includegraphics\{(.*)\}", TEXT)
    assert Path(f"{figure}.pdf").is_file()

    (script,) = [text for language, text in BLOCKS if language == "python"]
    Path("script.py").write_text(script)
    printed = run_shell(f"{shlex.quote(sys.executable)} script.py")
    assert re.search(r"^beta +0\.0 +0\.1 +0\.5$", printed, re.MULTILINE)
    assert Path("curves.pdf").is_file()
