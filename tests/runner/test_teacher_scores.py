"""A teacher's scores as an artifact: written once, shared by all cells, mended, used without the teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.runner import artifacts
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.progress import ProgressUpdate, Reporter
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.teacher_scores import SCORES_FOLDER, ensure_teacher_scores
from gkd_lab.status.verify import list_candidate_records, verify_records
from gkd_lab.store import Record, Store
from gkd_lab.teachers import score_files

from .tiny_experiments import contents, options, table_of, tiny_grid

SUPERVISED: dict[str, Any] = {"lmbda": 0, "evaluations": [{"decoding": "greedy"}]}
KEPT: dict[str, Any] = {**SUPERVISED, "teacher_scores": {"top_k": 4}}
TASKS = ("arithmetic", "translation")


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


class Interrupted(BaseException):
    """Stands for a killed process."""


class Stopping(Reporter):
    """Stops when the phase whose name contains `phase` has done `count`."""

    def __init__(self, phase: str, count: int) -> None:
        super().__init__(Console(quiet=True))
        self.name, self.count = phase, count

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[ProgressUpdate]:
        def advance(count: int) -> None:
            if self.name in name and count >= self.count:
                raise Interrupted

        yield advance


def losses(grid: Grid, outputs: Path) -> list[list[float]]:
    """Of each cell, in the grid's order."""
    return [[row["loss"] for row in Store(outputs).get_record(one).read_history()] for one in grid.cells]


def scores_of(outputs: Path) -> list[Record]:
    return [Record(folder) for folder in sorted(outputs.glob("nano/*/scores-*"))]


@pytest.mark.parametrize("task", TASKS)
def test_with_all_that_the_teacher_said_a_cell_learns_what_it_learns_live(task: str, tmp_path: Path) -> None:
    axes = {"teacher_scores": ["live", "full", {"top_k": 4}]}
    grid = tiny_grid(tmp_path, task, grid=axes, beta=0.5, **SUPERVISED)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    live, full, four = losses(grid, outputs)
    assert full == pytest.approx(live, rel=1e-4)
    assert four != pytest.approx(live, rel=1e-4)
    rows = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
    assert [row["status"] for row in rows] == ["done"] * 3
    assert [record.read_status()["state"] for record in scores_of(outputs)] == ["done"] * 2


def test_what_was_written_is_described_and_verified(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **KEPT)
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs))
    (record,) = scores_of(outputs)
    facts = record.read_status()
    assert (facts["state"], facts["rows"]) == ("done", 40)
    # Four log-probabilities and ids, the tail and the token itself; the rest is headers and starts.
    assert facts["tokens"] * 40 < facts["bytes"] < facts["tokens"] * 40 + 1000
    assert record.read_provenance()["packages"]
    source = Store(outputs).get_record(grid.cells[0]).read_provenance()["scores"]
    assert source["fingerprint"] == wanted(grid.cells[0]).full_fingerprint
    assert {"scores/index.json", "scores/00000.safetensors"} <= source["files"].keys()
    store = Store(outputs)
    assert verify_records(grid, store, list_candidate_records(grid, store)).mismatches == []
    (file,) = (record.folder / SCORES_FOLDER).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    (changed,) = verify_records(grid, store, list_candidate_records(grid, store)).mismatches
    assert "00000.safetensors has changed" in changed


def test_scores_are_written_once_for_all_cells_of_all_experiments(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **KEPT), options(outputs))
    before = {path: path.stat().st_mtime_ns for path in scores_of(outputs)[0].folder.rglob("*")}
    axes = {"beta": [0.5, 1], "seed": [1, 2], "train_rows": [8, 40]}
    more = tiny_grid(tmp_path, "arithmetic", grid=axes, **KEPT)
    assert run_grid(more, options(outputs)).failures == []
    assert {path: path.stat().st_mtime_ns for path in scores_of(outputs)[0].folder.rglob("*")} == before


def test_a_cell_whose_scores_are_there_is_trained_without_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **KEPT), options(outputs))
    more = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5], "seed": [0, 1]}, **KEPT)
    load = artifacts.load_artifact

    def never_the_teacher(record: Record, model: SftModel) -> artifacts.LoadedModel:
        assert model != more.cells[0].training.teacher, "the teacher was loaded"
        return load(record, model)

    monkeypatch.setattr(artifacts, "load_artifact", never_the_teacher)
    assert run_grid(more, options(outputs)).failures == []


def test_packed_or_alone_the_cells_are_the_same(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0, 0.5], "seed": [0, 1]}, **KEPT)
    found = []
    for pack in ("auto", "off"):
        outputs = tmp_path / pack
        assert run_grid(grid, options(outputs, pack=pack)).failures == []
        found.append(losses(grid, outputs))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def interrupted(folder: Path, phase: str, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Contents after a run, and after one that was stopped in this phase and then went on."""
    monkeypatch.setattr(score_files, "TARGET_FILE_BYTES", 4000)
    grid = tiny_grid(folder, "arithmetic", grid={"beta": [0, 0.5]}, **KEPT)
    whole, parts = folder / "whole", folder / "parts"
    run_grid(grid, options(whole))
    with pytest.raises(Interrupted):
        run_grid(grid, options(parts, Stopping(phase, count)))
    assert all(not record.read_status() for record in [*map(Store(parts).get_record, grid.cells)])
    assert run_grid(grid, options(parts)).failures == []
    return contents(whole), contents(parts)


@pytest.mark.parametrize(("phase", "count"), [("teacher's scores", 20), ("distillation", 3)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bit(
    phase: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = interrupted(tmp_path, phase, count, monkeypatch)
    assert sum(".safetensors" in name and "scores-" in name for name in whole) > 2
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_damaged_file_is_set_aside_and_made_again(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **KEPT), options(outputs))
    (record,) = scores_of(outputs)
    (file,) = (record.folder / SCORES_FOLDER).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"abcd")
    more = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5]}, **KEPT)
    assert run_grid(more, options(outputs)).failures == []
    assert file.read_bytes() == whole
    assert (record.folder / f"{SCORES_FOLDER}.damaged").is_dir()


def test_what_the_teacher_wrote_itself_can_be_scored(tmp_path: Path) -> None:
    source = {"lmbda": 0, "text": {"decoding": "greedy"}}
    own = {"source": source, "teacher_scores": "full", "evaluations": SUPERVISED["evaluations"]}
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5]}, **own)
    assert run_grid(grid, options(outputs)).failures == []
    live = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5]}, **{**own, "teacher_scores": "live"})
    assert run_grid(live, options(outputs)).failures == []
    (one,), (other,) = losses(grid, outputs), losses(live, outputs)
    assert one == pytest.approx(other, rel=1e-4)


def test_bfloat16_reads_as_the_live_teacher_does(tmp_path: Path) -> None:
    axes = {"teacher_scores": ["live", "full", {"dtype": "bfloat16"}]}
    grid = tiny_grid(tmp_path, "translation", grid=axes, precision="bf16", beta=0.5, **SUPERVISED)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    live, full, narrow = losses(grid, outputs)
    assert full == pytest.approx(live, rel=1e-3)
    assert narrow == pytest.approx(live, rel=5e-2)


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("made to fail")


def test_scores_that_fail_are_named_and_made_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **KEPT)
    outputs = tmp_path / "outputs"
    with monkeypatch.context() as broken:
        broken.setattr("gkd_lab.runner.teacher_scores.write_teacher_scores", failing)
        (line,) = run_grid(grid, options(outputs)).failures
        assert "made to fail" in line
    (line,) = run_grid(grid, options(outputs)).failures
    assert run_grid(grid, options(outputs, retry_failed=True)).failures == []


def wanted(cell: Cell) -> Any:
    assert cell.training.scores_spec is not None
    return cell.training.scores_spec


def test_scores_can_be_had_without_a_cell(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "translation", grid={"beta": [0]}, **KEPT)
    asked = wanted(grid.cells[0])
    record = ensure_teacher_scores(asked, grid.scale, options(tmp_path / "outputs"))
    assert record.read_status()["rows"] == 40
    assert record.folder.name == f"scores-top4-{asked.fingerprint}"
