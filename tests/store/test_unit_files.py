"""Files of units: the newest job of each unit, the starts and ends that its processes logged, its state."""

from pathlib import Path

from gkd_lab.config.units import plan_units
from gkd_lab.store import Store
from gkd_lab.store.unit_files import UnitFiles, UnitJob, UnitRuns
from gkd_lab.store.unit_state import measure_progress, read_output_state, read_unit_state

from ..runner.tiny_experiments import tiny_grid


def test_newest_job_of_a_unit_counts_and_its_end_is_kept(tmp_path: Path) -> None:
    files = UnitFiles.locate(tmp_path, "0123abcd")
    assert files.read_jobs() == {}
    old, new = UnitJob("a", "slurm", "1_0", "x.log"), UnitJob("a", "slurm", "2_0", "y.log")
    other = UnitJob("b", "slurm", "1_1", "z.log")
    files.log_jobs([old, other])
    files.log_end(old, "CANCELLED")
    files.log_end(other, "FAILED")
    files.log_jobs([new])
    files.log_end(old, "TIMEOUT")  # of the old job, seen late
    assert files.read_jobs() == {"a": new, "b": UnitJob("b", "slurm", "1_1", "z.log", "FAILED")}


def test_runs_count_starts_and_keep_the_last_place_and_time(tmp_path: Path) -> None:
    files = UnitFiles.locate(tmp_path, "0123abcd")
    assert files.read_runs("a") == UnitRuns()
    files.log_run("a", event="start", host="n1", device="0")
    assert files.read_runs("a") == UnitRuns(1, "n1", "0", is_running=True)
    files.log_run("a", event="start", host="n2", device="1")
    files.log_run("a", event="end", status=0, seconds=2.5, peak_bytes=7)
    runs = files.read_runs("a")
    assert (runs.starts, runs.requeues, runs.host, runs.device) == (2, 1, "n2", "1")
    assert (runs.is_running, runs.seconds, runs.peak_bytes) == (False, 2.5, 7)


def test_state_of_a_unit_is_that_of_its_records(tmp_path: Path) -> None:
    grid, store = tiny_grid(tmp_path, "arithmetic"), Store(tmp_path / "outputs")
    teacher, _, pack = plan_units(grid.cells, "auto")
    record = store.get_artifact("nano", "teacher", grid.cells[0].training.teacher)
    assert read_unit_state(teacher, store) == "missing"
    with record.lock():
        assert read_unit_state(teacher, store) == "running"
    record.mark_done()
    assert (read_output_state(teacher, store), read_unit_state(teacher, store)) == ("done", "missing")
    for evaluation in pack.cells[0].evaluations:
        scores = {metric: {"value": 1.0} for metric in evaluation.metrics}
        record.get_evaluation(evaluation).write_results(evaluation, [], scores)
    assert read_unit_state(teacher, store) == "done"
    assert read_unit_state(pack, store) == "missing"
    store.get_record(pack.cells[0]).mark_failed("ValueError: no")
    assert read_unit_state(pack, store) == "failed"


def test_progress_grows_with_checkpoints_and_finished_parts(tmp_path: Path) -> None:
    grid, store = tiny_grid(tmp_path, "arithmetic"), Store(tmp_path / "outputs")
    pack = plan_units(grid.cells, "auto")[-1]
    record = store.get_record(pack.cells[0])
    counts = [measure_progress(pack, store)]
    (record.steps_folder / "checkpoint-9").mkdir(parents=True)
    counts.append(measure_progress(pack, store))
    (record.steps_folder / "checkpoint-10").mkdir()
    counts.append(measure_progress(pack, store))
    record.finish()
    counts.append(measure_progress(pack, store))
    evaluation = pack.cells[0].evaluations[0]
    record.get_evaluation(evaluation).write_results(evaluation, [], {})
    counts.append(measure_progress(pack, store))
    assert counts[:3] == [0, 9, 10]
    assert counts == sorted(set(counts))
