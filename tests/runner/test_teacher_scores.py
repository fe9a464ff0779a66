"""Cached teacher scores: written once, shared by all cells, repaired, used without the teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gkd_lab.config import Cell, Grid
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.runner import artifacts
from gkd_lab.runner.progress import ProgressUpdate, Reporter, silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.teacher_scores import SCORES_FOLDER, ensure_teacher_scores
from gkd_lab.status.verify import list_candidate_records, verify_records
from gkd_lab.store import Record, Store
from gkd_lab.teachers import score_files

from .tiny_experiments import contents, options, table_of, tiny_grid

SUPERVISED: dict[str, Any] = {"lmbda": 0, "evaluations": [{"decoding": "greedy"}]}
CACHED: dict[str, Any] = {**SUPERVISED, "teacher_scores": {"top_k": 4}}
TASKS = ("arithmetic", "translation")


@pytest.fixture(scope="module", autouse=True)
def silence_library_output() -> None:
    silence_libraries()


class Interrupted(BaseException):
    """Stands for the end of a killed process."""


class StoppingReporter(Reporter):
    """Reporter that stops the run when the phase whose name contains `phase` has done `count`."""

    def __init__(self, phase: str, count: int) -> None:
        super().__init__(Console(quiet=True))
        self.name, self.count = phase, count

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0, **places: Any) -> Iterator[ProgressUpdate]:
        def update(count: int) -> None:
            if self.name in name and count >= self.count:
                raise Interrupted

        yield update


def read_losses(grid: Grid, outputs: Path) -> list[list[float]]:
    """Return the logged losses of each cell, in the grid's order."""
    return [[row["loss"] for row in Store(outputs).get_record(cell).read_history()] for cell in grid.cells]


def list_score_records(outputs: Path) -> list[Record]:
    return [Record(folder) for folder in sorted(outputs.glob("nano/*/scores-*"))]


@pytest.mark.parametrize("task", TASKS)
def test_full_cached_scores_train_as_the_live_teacher_does(task: str, tmp_path: Path) -> None:
    axes = {"teacher_scores": ["live", "full", {"top_k": 4}]}
    grid = tiny_grid(tmp_path, task, grid=axes, beta=0.5, **SUPERVISED)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    live, full, four = read_losses(grid, outputs)
    assert full == pytest.approx(live, rel=1e-4)
    assert four != pytest.approx(live, rel=1e-4)
    rows = [row for row in table_of(grid, outputs) if row["role"] == "cell"]
    assert [row["status"] for row in rows] == ["done"] * 3
    assert [record.read_status()["state"] for record in list_score_records(outputs)] == ["done"] * 2


def test_score_record_is_described_and_verified(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **CACHED)
    outputs = tmp_path / "outputs"
    run_grid(grid, options(outputs))
    (record,) = list_score_records(outputs)
    facts = record.read_status()
    assert (facts["state"], facts["rows"]) == ("done", 40)
    # Four log-probabilities and ids, the tail and the token itself; the rest is headers and starts.
    assert facts["tokens"] * 40 < facts["bytes"] < facts["tokens"] * 40 + 1000
    assert record.read_provenance()["packages"]
    source = Store(outputs).get_record(grid.cells[0]).read_provenance()["scores"]
    assert source["fingerprint"] == build_scores_spec(grid.cells[0]).full_fingerprint
    assert {"scores/index.json", "scores/00000.safetensors"} <= source["files"].keys()
    store = Store(outputs)
    assert verify_records(grid, store, list_candidate_records(grid, store)).mismatches == []
    (file,) = (record.folder / SCORES_FOLDER).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    (changed,) = verify_records(grid, store, list_candidate_records(grid, store)).mismatches
    assert "00000.safetensors has changed" in changed


def test_scores_are_written_once_for_all_experiments(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **CACHED), options(outputs))
    before = {path: path.stat().st_mtime_ns for path in list_score_records(outputs)[0].folder.rglob("*")}
    axes = {"beta": [0.5, 1], "seed": [1, 2], "train_rows": [8, 40]}
    second_grid = tiny_grid(tmp_path, "arithmetic", grid=axes, **CACHED)
    assert run_grid(second_grid, options(outputs)).failures == []
    assert {
        path: path.stat().st_mtime_ns for path in list_score_records(outputs)[0].folder.rglob("*")
    } == before


def test_cell_with_cached_scores_does_not_load_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **CACHED), options(outputs))
    second_grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5], "seed": [0, 1]}, **CACHED)
    load = artifacts.load_artifact

    def refuse_the_teacher(record: Record, model: SftModel) -> artifacts.LoadedModel:
        assert model != second_grid.cells[0].training.teacher, "the teacher was loaded"
        return load(record, model)

    monkeypatch.setattr(artifacts, "load_artifact", refuse_the_teacher)
    assert run_grid(second_grid, options(outputs)).failures == []


def test_packed_and_unpacked_cells_are_equal(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0, 0.5], "seed": [0, 1]}, **CACHED)
    all_losses = []
    for pack in ("auto", "off"):
        outputs = tmp_path / pack
        assert run_grid(grid, options(outputs, pack=pack)).failures == []
        all_losses.append(read_losses(grid, outputs))
    for first_losses, second_losses in zip(*all_losses, strict=True):
        assert first_losses == pytest.approx(second_losses, rel=1e-4)


def run_interrupted(folder: Path, phase: str, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return the contents after a whole run and after one interrupted in a phase and resumed."""
    monkeypatch.setattr(score_files, "TARGET_FILE_BYTES", 4000)
    grid = tiny_grid(folder, "arithmetic", grid={"beta": [0, 0.5]}, **CACHED)
    whole, parts = folder / "whole", folder / "parts"
    run_grid(grid, options(whole))
    with pytest.raises(Interrupted):
        run_grid(grid, options(parts, StoppingReporter(phase, count)))
    assert all(not record.read_status() for record in [*map(Store(parts).get_record, grid.cells)])
    assert run_grid(grid, options(parts)).failures == []
    return contents(whole), contents(parts)


@pytest.mark.parametrize(("phase", "count"), [("teacher's scores", 20), ("distillation", 3)])
def test_interrupted_run_resumes_to_equal_bytes(
    phase: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = run_interrupted(tmp_path, phase, count, monkeypatch)
    assert sum(".safetensors" in name and "scores-" in name for name in whole) > 2
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_damaged_scores_are_quarantined_and_rebuilt(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    run_grid(tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **CACHED), options(outputs))
    (record,) = list_score_records(outputs)
    (file,) = (record.folder / SCORES_FOLDER).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"abcd")
    second_grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5]}, **CACHED)
    assert run_grid(second_grid, options(outputs)).failures == []
    assert file.read_bytes() == whole
    assert (record.folder / f"{SCORES_FOLDER}.damaged").is_dir()


def test_teacher_text_can_be_scored(tmp_path: Path) -> None:
    source = {"lmbda": 0, "text": {"decoding": "greedy"}}
    text_changes = {"source": source, "teacher_scores": "full", "evaluations": SUPERVISED["evaluations"]}
    outputs = tmp_path / "outputs"
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0.5]}, **text_changes)
    assert run_grid(grid, options(outputs)).failures == []
    live = tiny_grid(
        tmp_path, "arithmetic", grid={"beta": [0.5]}, **{**text_changes, "teacher_scores": "live"}
    )
    assert run_grid(live, options(outputs)).failures == []
    (first_losses,), (second_losses,) = read_losses(grid, outputs), read_losses(live, outputs)
    assert first_losses == pytest.approx(second_losses, rel=1e-4)


def test_bfloat16_scores_equal_the_live_teachers(tmp_path: Path) -> None:
    axes = {"teacher_scores": ["live", "full", {"dtype": "bfloat16"}]}
    grid = tiny_grid(tmp_path, "translation", grid=axes, precision="bf16", beta=0.5, **SUPERVISED)
    outputs = tmp_path / "outputs"
    assert run_grid(grid, options(outputs)).failures == []
    live, full, narrow = read_losses(grid, outputs)
    assert full == pytest.approx(live, rel=1e-3)
    assert narrow == pytest.approx(live, rel=5e-2)


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("failed on purpose")


def test_failed_scores_are_listed_and_retried_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"beta": [0]}, **CACHED)
    outputs = tmp_path / "outputs"
    with monkeypatch.context() as broken:
        broken.setattr("gkd_lab.runner.teacher_scores.write_teacher_scores", fail)
        (line,) = run_grid(grid, options(outputs)).failures
        assert "failed on purpose" in line
    (line,) = run_grid(grid, options(outputs)).failures
    assert run_grid(grid, options(outputs, retry_failed=True)).failures == []


def build_scores_spec(cell: Cell) -> Any:
    assert cell.training.scores_spec is not None
    return cell.training.scores_spec


def test_scores_can_be_computed_without_a_cell(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "translation", grid={"beta": [0]}, **CACHED)
    scores_spec = build_scores_spec(grid.cells[0])
    record = ensure_teacher_scores(scores_spec, grid.scale, options(tmp_path / "outputs"))
    assert record.read_status()["rows"] == 40
    assert record.folder.name == f"scores-top4-{scores_spec.fingerprint}"
