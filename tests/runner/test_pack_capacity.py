"""Pack limits stay in the outputs folder: the first process decides, kills for lack of memory lower them."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gkd_lab.cli import main
from gkd_lab.config import Grid
from gkd_lab.config.packs import AUTO_PACK_SIZE
from gkd_lab.config.units import plan_units
from gkd_lab.runner import pack_capacity
from gkd_lab.runner.memory import PackCapacity
from gkd_lab.runner.pack_capacity import (
    absorb_kills,
    attempt_pack,
    keep_capacity,
    keep_shortage,
    split_packs,
)
from gkd_lab.runner.progress import Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.status.overview import build_overview
from gkd_lab.status.render import render_summary
from gkd_lab.store import Store
from gkd_lab.store.attempts import mark_killed_for_memory, read_attempt
from gkd_lab.store.pack_limits import KeptLimit, PackLimits

from .tiny_experiments import contents, interrupted_at, options, tiny_grid

GIB = 2**30


def list_sizes(grid: Grid, run_options: RunOptions) -> list[int]:
    return [len(pack) for pack in split_packs(grid.cells, run_options)]


def record_text(outputs: Path, **changes: object) -> tuple[RunOptions, io.StringIO]:
    """Return options and the text that they print."""
    text = io.StringIO()
    return options(outputs, Reporter(Console(file=text, width=500)), **changes), text


def leave_attempt(
    grid: Grid, outputs: Path, cells: int, *, was_killed: bool = True, **changes: object
) -> None:
    """Leave the records of the first `cells` cells as a process that the kernel has killed leaves them."""
    facts = {"stage": "training", "cells": cells, "micro_batches": 1, "device": "cpu", "machine": "far"}
    for cell in grid.cells[:cells]:
        record = Store(outputs).get_record(cell)
        record.folder.mkdir(parents=True, exist_ok=True)
        (record.folder / "attempt.json").write_text(json.dumps({**facts, **changes}))
        if was_killed:
            assert mark_killed_for_memory(record)


@pytest.mark.parametrize(("workers", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 2]), (9, [1] * 6)])
def test_each_worker_of_the_first_run_gets_a_pack(workers: int, sizes: list[int], tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    assert list_sizes(grid, options(tmp_path / "outputs", workers=workers)) == sizes


def test_later_runs_keep_the_packs_of_the_first_whatever_their_workers(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    outputs = tmp_path / "outputs"
    packs = split_packs(grid.cells, options(outputs, workers=2))
    for workers in (1, 3, 8):
        assert split_packs(grid.cells, options(outputs, workers=workers)) == packs
    assert list_sizes(grid, options(outputs, pack=4)) == [4, 2], "--pack K is the user's own"
    assert list_sizes(grid, options(outputs, pack="off")) == [1] * 6
    larger_grid = tiny_grid(
        tmp_path, "arithmetic", name="larger", grid={"lmbda": [0, 1], "seed": [0, 1, 2, 3]}
    )
    assert list_sizes(larger_grid, options(outputs, workers=1)) == [8], "another grid decides for itself"


def test_workers_that_start_together_agree_on_one_limit(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gkd_lab import experiments\n"
        "from gkd_lab.store.pack_limits import PackLimits\n"
        "grid = experiments.load(sys.argv[1], outputs=Path(sys.argv[2]))\n"
        "print(PackLimits(Path(sys.argv[2])).keep_grid_limit(grid.cells, int(sys.argv[3])))"
    )
    tiny_grid(tmp_path, "arithmetic")
    command = [sys.executable, "-c", script, str(tmp_path / "tiny.yaml"), str(tmp_path / "outputs")]
    processes = [
        subprocess.Popen([*command, str(proposed)], stdout=subprocess.PIPE, text=True)
        for proposed in (2, 3, 4)
    ]
    answers = {process.communicate()[0].strip() for process in processes}
    assert len(answers) == 1
    assert answers <= {"2", "3", "4"}


def test_capacity_is_measured_once_and_kept(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options, text = record_text(tmp_path / "outputs")
    first = keep_capacity(grid.cells, "training", run_options, lambda: (GIB, 5 * GIB))
    assert (first.max_cells, re.findall(r"\d+", first.reason)) == (3, ["6", "6", "5", "3"])
    assert first.reason in text.getvalue()
    assert keep_capacity(grid.cells, "training", run_options, lambda: (GIB, 100 * GIB)) == first
    assert keep_capacity(grid.cells[:4], "training", run_options, lambda: (GIB, GIB)) == PackCapacity(4)
    evaluation = keep_capacity(grid.cells, "evaluation", run_options, lambda: (GIB, 100 * GIB))
    assert evaluation == PackCapacity(6), "evaluations have a capacity of their own"
    limit = PackLimits(tmp_path / "outputs").read_capacity(grid.cells[0], "evaluation", "cpu")
    assert limit == KeptLimit(AUTO_PACK_SIZE)
    larger_student = tiny_grid(tmp_path, "arithmetic", "wide", student={"layers": 1, "width": 16, "heads": 2})
    other = keep_capacity(larger_student.cells, "training", run_options, lambda: (GIB, 100 * GIB))
    assert other == PackCapacity(6), "so have other models"


def test_running_out_of_memory_lowers_the_kept_capacity(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options = options(tmp_path / "outputs")
    keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB))
    keep_shortage(grid.cells[0], "training", run_options, PackCapacity(3, "out of memory with 6 cells"))
    keep_shortage(grid.cells[1], "training", run_options, PackCapacity(5, "out of memory with 9 cells"))
    capacity = keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB))
    assert capacity == PackCapacity(3, "out of memory with 6 cells")
    entries = json.loads((tmp_path / "outputs" / ".packs" / "limits.json").read_text())
    (entry,) = entries.values()
    assert [old["cells"] for old in entry["history"]] == [AUTO_PACK_SIZE]
    assert keep_capacity(grid.cells, "training", options(tmp_path / "outputs", pack=6), lambda: (1, 1)) == (
        PackCapacity(6)
    ), "--pack 6 may try again"


def test_kill_for_lack_of_memory_halves_the_pack(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options, text = record_text(tmp_path / "outputs")
    keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB))
    leave_attempt(grid, tmp_path / "outputs", 6)
    absorb_kills(grid.cells, run_options)
    reason = "killed for lack of memory with 6 cells as one model"
    assert text.getvalue().count(f"{reason}; going on with 3 at a time") == 1
    for pack in ("auto", 6):  # else `--pack 6` would be killed for ever
        own_options = options(tmp_path / "outputs", pack=pack)
        assert keep_capacity(grid.cells, "training", own_options, lambda: (1, GIB)) == PackCapacity(3, reason)
    assert all(read_attempt(Store(tmp_path / "outputs").get_record(cell)) is None for cell in grid.cells)
    leave_attempt(grid, tmp_path / "outputs", 3)
    absorb_kills(grid.cells, run_options)
    assert keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB)).max_cells == 2


def test_death_without_evidence_of_a_kill_for_memory_changes_no_pack(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options, text = record_text(tmp_path / "outputs")
    leave_attempt(grid, tmp_path / "outputs", 6, was_killed=False)
    absorb_kills(grid.cells, run_options)
    assert keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB)) == PackCapacity(6)
    assert text.getvalue() == ""


def die_in_attempt(grid: Grid, run_options: RunOptions, machine: str = "far") -> None:
    """Leave what a process on a machine leaves that is killed in a training of all cells."""
    paths = [run_options.store.get_record(cell).folder / "attempt.json" for cell in grid.cells]
    with attempt_pack(grid.cells, "training", run_options):
        attempts = [json.loads(path.read_text()) for path in paths]
    for path, attempt in zip(paths, attempts, strict=True):
        path.write_text(json.dumps({**attempt, "machine": machine}))


def test_second_silent_death_in_a_row_on_other_machines_halves_the_pack(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options, text = record_text(tmp_path / "outputs")
    checkpoint = run_options.store.get_record(grid.cells[0]).steps_folder / "checkpoint-9"
    for progress in (checkpoint, checkpoint.with_name("checkpoint-10")):
        die_in_attempt(grid, run_options)
        absorb_kills(grid.cells, run_options)
        progress.mkdir(parents=True)
    assert text.getvalue() == "", "each got further than the one before"
    die_in_attempt(grid, run_options)
    absorb_kills(grid.cells, run_options)
    die_in_attempt(grid, run_options, "farther")
    absorb_kills(grid.cells, run_options)
    reason = "ended twice without a word with 6 cells as one model"
    assert text.getvalue().count(f"{reason}; going on with 3 at a time") == 1
    assert keep_capacity(grid.cells, "training", run_options, lambda: (1, GIB)) == PackCapacity(3, reason)
    assert list(run_options.outputs.rglob("attempt.json")) == []


def test_finished_cells_keep_no_attempt_of_a_killed_process(tmp_path: Path) -> None:
    changes = {"grid": {"lmbda": [0.5, 1]}, "evaluations": [{"decoding": "greedy"}]}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    run_options = options(tmp_path / "outputs")
    assert run_grid(grid, run_options).failures == []
    leave_attempt(grid, run_options.outputs, 2, was_killed=False)
    assert run_grid(grid, run_options).failures == []
    assert list(run_options.outputs.rglob("attempt.json")) == []
    assert {len(run_options.store.get_record(cell).read_provenance()["pack"]) for cell in grid.cells} == {2}


def test_single_cell_that_was_killed_starts_with_smaller_micro_batches(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0.5]}, evaluations=[{"decoding": "greedy"}])
    run_options = options(tmp_path / "outputs")
    leave_attempt(grid, tmp_path / "outputs", 1)
    assert run_grid(grid, run_options).failures == []
    assert Store(tmp_path / "outputs").get_record(grid.cells[0]).read_provenance()["rows_at_once"] == 2
    leave_attempt(grid, tmp_path / "outputs", 1, micro_batches=2)
    absorb_kills(grid.cells, run_options)
    assert pack_capacity.read_micro_batches(grid.cells[0], run_options) == 4


def test_kill_shows_in_plan_and_provenance(tmp_path: Path) -> None:
    changes = {"grid": {"lmbda": [0.5, 1], "beta": [0, 0.5]}, "evaluations": [{"decoding": "greedy"}]}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    outputs = tmp_path / "outputs"
    leave_attempt(grid, outputs, 4)
    assert run_grid(grid, options(outputs)).failures == []
    reason = "killed for lack of memory with 4 cells as one model"
    provenances = [Store(outputs).get_record(cell).read_provenance() for cell in grid.cells]
    assert [(len(facts["pack"]), facts["pack_limit"]) for facts in provenances] == [(2, reason)] * 4
    assert list(outputs.rglob("attempt.json")) == []
    plan = render_summary(build_overview(grid, Store(outputs), "auto"))
    assert any(line.endswith(f"training on cpu: at most 2 cells as one model: {reason}") for line in plan)
    assert not any(
        "as one model" in line for line in render_summary(build_overview(grid, Store(outputs), "off"))
    )


def test_plan_shows_the_packs_that_the_first_run_decided_on(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    store = Store(tmp_path / "outputs")
    assert build_overview(grid, store, "auto").pack_sizes == (6,)
    split_packs(grid.cells, options(store.root, workers=2))
    assert build_overview(grid, store, "auto").pack_sizes == (3, 3)
    assert build_overview(grid, store, 4).pack_sizes == (4, 2)


@pytest.mark.slow
def test_run_that_goes_on_with_fewer_workers_gives_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one of two workers, ended by a run with one."""
    changes = {"grid": {"lmbda": [0.5, 1], "beta": [0, 0.5]}, "evaluations": [{"decoding": "greedy"}]}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    whole, elastic = tmp_path / "whole", tmp_path / "elastic"
    assert run_grid(grid, options(whole, workers=2)).failures == []
    with interrupted_at(3, monkeypatch):
        run_grid(grid, options(elastic, workers=2))
    assert run_grid(grid, options(elastic, workers=1)).failures == []
    packs = [Store(elastic).get_record(cell).read_provenance()["pack"] for cell in grid.cells]
    assert [len(pack) for pack in packs] == [2] * 4
    assert contents(elastic) == contents(whole)


def run_command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def test_units_of_a_cluster_are_the_packs_of_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed by the driver, and found again by a job; both without `--pack`."""
    grid = tiny_grid(tmp_path, "arithmetic", evaluations=[{"decoding": "greedy"}])
    monkeypatch.chdir(tmp_path)
    assert run_command("run", "tiny.yaml", "--executor", "slurm", "--print") == 0
    assert capsys.readouterr().out.count("arithmetic: pack of 6 cells") == 1
    assert not (tmp_path / "outputs").exists()
    packs = split_packs(grid.cells, options(tmp_path / "outputs", workers=2))
    assert run_command("run", "tiny.yaml", "--executor", "slurm", "--print") == 0
    assert capsys.readouterr().out.count("arithmetic: pack of 3 cells") == 2
    (unit, _) = (unit for unit in plan_units(grid.cells, 3) if unit.kind == "pack")
    assert run_command("unit", "tiny.yaml", "--unit", unit.id) == 0
    records = [Store(tmp_path / "outputs").get_record(cell) for cell in packs[0]]
    assert [len(record.read_provenance()["pack"]) for record in records] == [3] * 3
