"""`gkd-lab unit` does one unit; all units in order leave what a local run with the same packs leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gkd_lab.cli import main
from gkd_lab.config.units import Unit, plan_units
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles

from .stub_units import FAILING_FILE
from .tiny_experiments import contents, options, table_of, tiny_grid

STUB = [sys.executable, str(Path(__file__).with_name("stub_units.py"))]


def run_command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def start_stub(unit: Unit, folder: Path, **variables: str) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    words = ["unit", "tiny.yaml", "--unit", unit.id, "--outputs", "outputs", "--pack", "3"]
    environment = {**os.environ, "PYTHONPATH": root, **variables}
    return subprocess.Popen(
        [*STUB, *words],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_units_leave_the_records_of_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"source": {"lmbda": 0, "text": {}}, "grid": {"beta": [0, 0.5]}, "teacher_scores": "full"}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    monkeypatch.chdir(tmp_path)
    for unit in plan_units(grid.cells, "auto"):
        assert run_command("unit", "tiny.yaml", "--unit", unit.id, "--outputs", "units") == 0
    local = options(tmp_path / "local", pack="auto")
    local = replace(local, checkpoint_every=100, log_every=20)
    assert run_grid(grid, local).failures == []
    assert table_of(grid, tmp_path / "units") == table_of(grid, tmp_path / "local")
    units, local_files = (
        {name: content for name, content in contents(tmp_path / folder).items() if name.startswith("nano/")}
        for folder in ("units", "local")
    )
    assert units == local_files


def test_unknown_unit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_grid(tmp_path, "arithmetic")
    monkeypatch.chdir(tmp_path)
    assert run_command("unit", "tiny.yaml", "--unit", "0123456789ab") == 2
    assert "has no such unit" in capsys.readouterr().err


def test_unit_of_a_failed_need_runs_no_cell_and_marks_none(tmp_path: Path) -> None:
    grid, store = tiny_grid(tmp_path, "arithmetic"), Store(tmp_path / "outputs")
    teacher, start, pack, _ = plan_units(grid.cells, 3)
    (tmp_path / FAILING_FILE).write_text(grid.cells[0].training.teacher.fingerprint)
    for unit in (teacher, start):
        process = start_stub(unit, tmp_path)
        assert process.wait() == (1 if unit is teacher else 0)
    process = start_stub(pack, tmp_path)
    _, output = process.communicate()
    assert process.returncode == 1
    (line,) = output.splitlines()
    assert line.startswith("failed: arithmetic: pack of 3 cells: arithmetic: teacher has failed (see ")
    assert all(store.get_record(cell).read_state() == "missing" for cell in pack.cells)


def test_cells_of_other_students_run_where_one_student_has_failed(tmp_path: Path) -> None:
    student = {"layers": 1, "width": 8, "heads": 2, "sft": {"steps": 4}, "init_seed": "cell"}
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0], "seed": [0, 1, 2]}, student=student)
    *artifacts, pack = plan_units(grid.cells, 3)
    (tmp_path / FAILING_FILE).write_text(grid.cells[1].training.start.fingerprint)
    for unit in artifacts:
        start_stub(unit, tmp_path).wait()
    assert start_stub(pack, tmp_path).wait() == 1
    store = Store(tmp_path / "outputs")
    assert [store.get_record(cell).read_state() for cell in grid.cells] == ["done", "missing", "done"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_next_start_goes_on(number: int, status: int, tmp_path: Path) -> None:
    """More signals, as a cluster sends to a script and its children, do not stop it before it has saved."""
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, lmbda=0)
    unit = plan_units(grid.cells, 3)[-1]
    process = start_stub(unit, tmp_path, GKD_STUB_SECONDS="0.1")
    record = Store(tmp_path / "outputs").get_record(grid.cells[0])
    deadline = time.monotonic() + 60
    while not record.metrics_file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(3):
        process.send_signal(number)
    assert process.wait() == status
    (checkpoint,) = record.steps_folder.iterdir()
    step = int(checkpoint.name.rpartition("-")[2])
    assert [row["step"] for row in record.read_history()] == list(range(1, step + 1))
    files = UnitFiles.locate(tmp_path / "outputs", grid.fingerprint)
    assert (files.progress_folder / unit.id).read_text() == f"{step}\n"
    assert start_stub(unit, tmp_path).wait() == 0
    assert [row["step"] for row in record.read_history()] == list(range(1, 41))
    starts = [json.loads(line)["step"] for line in (record.folder / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, step]
    assert files.read_runs(unit.id).requeues == 1
