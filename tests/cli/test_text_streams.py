"""Names of any script on the command line, in files and in messages, also where the locale has only ASCII."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gkd_lab.cli.text_streams import accept_any_text

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""An install without locale, whose Python neither coerces it nor turns to UTF-8 by itself."""
EXPERIMENT = {
    "description": "Größe",
    "task": "arithmetic",
    "grid": {"lmbda": [0, 1]},
    "data": {"source": "daten_ü"},
    "teacher": {"layers": 1, "width": 16, "heads": 2, "sft": {"steps": 2}},
    "student": {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 2}},
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 0,
    "cooldown_steps": 0,
    "evaluations": [{"decoding": "greedy"}],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "daten_ü").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"question": f"{n} + 1 = ?", "answer": f"Größer: {n + 1} #### {n + 1}"} for n in range(4)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "daten_ü" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "größe.yaml").write_text(yaml.safe_dump(EXPERIMENT, allow_unicode=True), encoding="utf-8")
    return tmp_path


def run_child(*words: str | bytes, **environment: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; returns (exit status, stdout, stderr), which must be UTF-8."""
    command = [sys.executable, "-m", "gkd_lab", *words]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


REFUSED = {
    "plan grösse.yaml": "no experiment file 'grösse.yaml'",
    "plan größe.yaml --set data.source=daten_ö": "no folder 'daten_ö'",
    "run größe.yaml --set task=größe": "unknown task 'größe'",
    "cell --task größe": "unknown task 'größe'",
    "table größe.yaml --format größe": "'größe' is not one of",
    "evaluate daten_ü --tasks x": "'daten_ü' is not a record",
    "compare daten_ü daten_ü": "'daten_ü' is not a record",
    "selfcheck --teacher daten_ü --student daten_ö": "'daten_ö': no such folder",
    "lüst": "No such command 'lüst'",
}


@pytest.mark.slow
@pytest.mark.parametrize(("request_line", "message"), REFUSED.items())
def test_without_a_locale_messages_show_names_as_they_are(request_line: str, message: str) -> None:
    status, out, err = run_child(*request_line.split(), **ASCII)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err and "\\" not in err


@pytest.mark.slow
def test_without_a_locale_an_experiment_runs_from_plan_to_report(folder: Path) -> None:
    outputs = ("--outputs", "Läufe")
    status, out, err = run_child("run", "größe.yaml", *outputs, **ASCII)
    assert status == 0, err
    for command in ("plan", "status", "table", "claims", "verify", "rescore", "report"):
        status, out, err = run_child(command, "größe.yaml", *outputs, **ASCII)
        assert status == 0, (command, err)
        assert "\\udc" not in out + err
    assert "größe" in out, "the report's path"
    assert any((folder / "Läufe").rglob("predictions.jsonl"))


def test_another_encoding_of_the_output_crashes_no_command() -> None:
    status, out, err = run_child("plan", "grösse.yaml", PYTHONIOENCODING="ascii")
    assert (status, out) == (2, "")
    assert r"'gr\xf6sse.yaml'" in err


def test_a_stream_writes_bytes_of_names_back_and_escapes_half_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    accept_any_text()
    print(os.fsdecode(b"daten_\xfc"), "ü", "\ud83d", end="", flush=True)
    assert stream.buffer.getvalue() == b"daten_\xfc " + "ü".encode() + rb" \ud83d"


def test_a_stream_of_ascii_escapes_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    accept_any_text()
    print("größe", "\udcc3\udcbc", file=sys.stderr, end="", flush=True)
    assert stream.buffer.getvalue() == rb"gr\xf6\xdfe " + "ü".encode()


@pytest.mark.slow
def test_a_home_folder_that_cannot_be_written_prints_nothing_of_matplotlib(folder: Path) -> None:
    (folder / "home").write_text("a file")
    unset = {"MPLCONFIGDIR": "", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    status, out, err = run_child("report", "größe.yaml", HOME=str(folder / "home"), **unset)
    assert status == 0, err
    assert "atplotlib" not in out + err
