"""docs/train.md does what it says: its rows and its file make the run that it shows."""

import re
import shlex
from pathlib import Path

import pytest

from .user_pair import run_command

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()


def find_block(language: str) -> str:
    """Return the page's only block of code of a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return block


def test_the_pages_rows_and_file_make_the_run_that_it_shows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "validation", "test"):
        Path(f"data/{split}.jsonl").write_text(2 * find_block("json"))
    Path("run.yaml").write_text(find_block("yaml"))
    program, *words = shlex.split(find_block("bash"))
    assert program == "gkd-lab"
    status, output, error = run_command(capsys, *words)
    assert (status, error) == (0, "")
    assert "'eval_rouge1'" in output and "'eval_accuracy'" in output
    shown = find_block("text").splitlines()
    printed = output.splitlines()[-len(shown) :]
    for line, form in zip(printed, shown, strict=True):
        pattern = re.sub("SCORE|LOW|HIGH", r"\\d+\\.\\d\\d", re.escape(form)).replace("N", r"\d+")
        assert re.fullmatch(pattern, line), (line, form)
    files = re.findall(r"`([\w.-]+)/?`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)[:4]))
    assert "model.safetensors" in files and len(files) == 7
    for name in files:
        assert Path("out", name).exists(), name
