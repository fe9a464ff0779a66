"""Fixtures of the command line: an empty folder, and a function that runs a command in it."""

from pathlib import Path

import pytest

from gkd_lab.cli import main

from .command_runs import RunCommand


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts where a user may: in a folder with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Run a command and return (exit status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run
